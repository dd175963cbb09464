"""Layers (flax.nnx): the scoring network, attention and a decoder that mixes kinds of attention."""

from sparsek_jax.nn.attention import SparseKAttention
from sparsek_jax.nn.config import AttentionConfig, DecoderConfig
from sparsek_jax.nn.decoder import Decoder
from sparsek_jax.nn.scorer import ScoringNetwork

__all__ = ["AttentionConfig", "Decoder", "DecoderConfig", "ScoringNetwork", "SparseKAttention"]
