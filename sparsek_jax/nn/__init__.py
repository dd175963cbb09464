"""Flax (NNX) layers: scoring network, attention of three kinds and a decoder."""

from sparsek_jax.nn.attention import DenseAttention, SparseKAttention, WindowAttention
from sparsek_jax.nn.cache import DecoderCache
from sparsek_jax.nn.config import AttentionConfig, DecoderConfig
from sparsek_jax.nn.decoder import Decoder
from sparsek_jax.nn.scorer import ScoringNetwork

__all__ = [
    "AttentionConfig",
    "Decoder",
    "DecoderCache",
    "DecoderConfig",
    "DenseAttention",
    "ScoringNetwork",
    "SparseKAttention",
    "WindowAttention",
]
