"""Flax (NNX) layers: scoring network, attention of several kinds and a decoder."""

from sparsek_jax.nn.alternatives import (
    BigBirdAttention,
    DenseAttention,
    GatedLinearAttention,
    KeyNormAttention,
    LshAttention,
    MobaAttention,
    NativeSparseAttention,
    RandomAttention,
    SinkAttention,
    SparseKLinearAttention,
    StridedAttention,
    WindowAttention,
)
from sparsek_jax.nn.attention import SparseKAttention
from sparsek_jax.nn.cache import DecoderCache
from sparsek_jax.nn.config import AttentionConfig, DecoderConfig
from sparsek_jax.nn.decoder import Decoder
from sparsek_jax.nn.scorer import ScoringNetwork

__all__ = [
    "AttentionConfig",
    "BigBirdAttention",
    "Decoder",
    "DecoderCache",
    "DecoderConfig",
    "DenseAttention",
    "GatedLinearAttention",
    "KeyNormAttention",
    "LshAttention",
    "MobaAttention",
    "NativeSparseAttention",
    "RandomAttention",
    "ScoringNetwork",
    "SinkAttention",
    "SparseKAttention",
    "SparseKLinearAttention",
    "StridedAttention",
    "WindowAttention",
]
