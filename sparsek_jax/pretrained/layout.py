"""Which tensor of a Hugging Face model holds which parameters of a decoder, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from sparsek_jax import nn
from sparsek_jax.nn.config import KINDS, KINDS_WITH_PARAMETERS, has_scorer
from sparsek_jax.pretrained.families import is_neox
from sparsek_jax.pretrained.source import ConversionError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      name: In the file.
      shape: In the file.
      params: The parameters in it, by the names of `training.parameters`.
      split: Cuts the tensor into those parameters.
      join: Makes it of them; undoes `split` to the bit.
    """

    name: str
    shape: tuple[int, ...]
    params: tuple[str, ...]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    join: Callable[..., np.ndarray]

    @property
    def is_scorer(self) -> bool:
        """Whether it belongs to a scoring network, which no other library has."""
        return ".scorer." in self.name


def layout(config: nn.DecoderConfig) -> list[Tensor]:
    """Every tensor of a decoder, in the order of the model.

    Raises:
      ConversionError: It has parameters for which the files have no place.
    """
    attention = config.attention
    for kind in attention.pattern or (attention.kind,):
        if kind in KINDS_WITH_PARAMETERS:
            raise ConversionError(
                f"attention of the kind {kind!r} has parameters that files of Hugging Face cannot "
                f"hold; expected one of {tuple(x for x in KINDS if x not in KINDS_WITH_PARAMETERS)}"
            )
    return list(_neox(config) if is_neox(config) else _llama(config))


def _llama(config: nn.DecoderConfig) -> Iterator[Tensor]:
    attention = config.attention
    table = (config.vocab_size, config.d_model)
    query_dim = attention.num_heads * attention.head_dim
    kv_dim = attention.num_kv_heads * attention.head_dim
    yield _same("model.embed_tokens.weight", table, "embedding")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield from _norm(config, f"{theirs}.input_layernorm", f"{ours}.attention_norm")
        for name, module, outputs in (
            ("q_proj", "query", query_dim),
            ("k_proj", "key", kv_dim),
            ("v_proj", "value", kv_dim),
        ):
            yield from _linear(
                f"{theirs}.self_attn.{name}",
                f"{ours}.attention.{module}",
                (outputs, config.d_model),
                attention.qkv_bias,
            )
        yield from _linear(
            f"{theirs}.self_attn.o_proj",
            f"{ours}.attention.out",
            (config.d_model, query_dim),
            attention.out_bias,
        )
        if attention.qk_norm:
            for name, module in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
                yield _same(
                    f"{theirs}.self_attn.{name}.weight",
                    (attention.head_dim,),
                    f"{ours}.attention.{module}.scale",
                )
        yield from _scorer(config, i, f"{theirs}.self_attn")
        yield from _norm(config, f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm")
        for name, module in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            shape = (config.mlp_dim, config.d_model)
            yield from _linear(
                f"{theirs}.mlp.{name}",
                f"{ours}.mlp.{module}",
                shape[::-1] if module == "down" else shape,
                config.mlp_bias,
            )
    yield from _norm(config, "model.norm", "final_norm")
    if not config.tie_embeddings:
        yield _same("lm_head.weight", table, "output")


def _neox(config: nn.DecoderConfig) -> Iterator[Tensor]:
    attention = config.attention
    table = (config.vocab_size, config.d_model)
    yield _same("gpt_neox.embed_in.weight", table, "embedding")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        yield from _norm(config, f"{theirs}.input_layernorm", f"{ours}.attention_norm")
        yield from _fused_qkv(
            f"{theirs}.attention.query_key_value", f"{ours}.attention", config.d_model, attention
        )
        yield from _linear(
            f"{theirs}.attention.dense",
            f"{ours}.attention.out",
            (config.d_model, config.d_model),
            attention.out_bias,
        )
        yield from _scorer(config, i, f"{theirs}.attention")
        yield from _norm(config, f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm")
        up = (config.mlp_dim, config.d_model)
        yield from _linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.mlp.up", up, config.mlp_bias)
        yield from _linear(
            f"{theirs}.mlp.dense_4h_to_h", f"{ours}.mlp.down", up[::-1], config.mlp_bias
        )
    yield from _norm(config, "gpt_neox.final_layer_norm", "final_norm")
    if not config.tie_embeddings:
        yield _same("embed_out.weight", table, "output")


def _same(name, shape, param):
    return Tensor(name, shape, (param,), lambda x: (x,), lambda x: x)


def _transposed(name, shape, param):
    return Tensor(name, shape, (param,), lambda x: (x.T,), lambda x: x.T)


def _linear(name, param, shape, bias):
    """A projection, which torch stores as `[outputs, inputs]`."""
    yield _transposed(f"{name}.weight", shape, f"{param}.kernel")
    if bias:
        yield _same(f"{name}.bias", shape[:1], f"{param}.bias")


def _norm(config, name, param):
    yield _same(f"{name}.weight", (config.d_model,), f"{param}.scale")
    if config.norm == "layernorm":
        yield _same(f"{name}.bias", (config.d_model,), f"{param}.bias")


def _scorer(config, layer, name):
    attention = config.attention
    if not has_scorer(attention.layer_kind(layer)):
        return
    num_scores = 1 if attention.shared_scores else attention.num_kv_heads
    param = f"layers.{layer}.attention.scorer"
    shape = (num_scores, config.d_model)
    yield _transposed(f"{name}.scorer.weight", shape, f"{param}.kernel")
    if attention.timestep_norm:
        yield _same(f"{name}.scorer.norm.weight", (num_scores,), f"{param}.norm.gain")
    if attention.learned_slope:
        yield _same(f"{name}.scorer.slope", (num_scores,), f"{param}.head_slope")


def _fused_qkv(name, param, d_model, attention):
    """GPT-NeoX's projection: for every head its query, key and value after one another."""
    modules = ("query", "key", "value")
    heads = (attention.num_heads, 3, attention.head_dim)
    rows = 3 * d_model

    def split(x):
        parts = x.reshape(*heads, *x.shape[1:])
        return tuple(parts[:, i].reshape(-1, *x.shape[1:]).T for i in range(3))

    def join(*params):
        parts = [x.T.reshape(heads[0], heads[2], *x.shape[:-1]) for x in params]
        return np.stack(parts, axis=1).reshape(rows, *params[0].shape[:-1])

    def tensor(kind, shape, param_kind):
        params = tuple(f"{param}.{module}.{param_kind}" for module in modules)
        return Tensor(f"{name}.{kind}", shape, params, split, join)

    yield tensor("weight", (rows, d_model), "kernel")
    if attention.qkv_bias:
        yield tensor("bias", (rows,), "bias")
