"""Tensors of a file to parameters of a decoder, one at a time, each of them accounted for."""

from __future__ import annotations

import dataclasses
import mmap
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsek_jax import nn
from sparsek_jax.nn.config import has_scorer
from sparsek_jax.pretrained.layout import Tensor, layout
from sparsek_jax.pretrained.source import ConversionError, Source, StoredTensor, reading
from sparsek_jax.training.parameters import Params

# What old versions of transformers stored though it is no weight: masks and rotary frequencies.
_BUFFER = re.compile(
    r"(model|gpt_neox)\.layers\.\d+\.(self_attn|attention)\."
    r"(rotary_emb\.inv_freq|masked_bias|bias)"
)
_OUTPUTS = ("lm_head.weight", "embed_out.weight")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the tensors of a source become parameters.

    Attributes:
      stored: Tensors with what is stored of them.
      new: Tensors of scorers, which the source does not have.
      dropped: Names of tensors that are of no use: buffers, and scorers where attention is dense.
      duplicate: A stored output projection that must equal the embedding it is tied to.
    """

    stored: Sequence[tuple[Tensor, StoredTensor]]
    new: Sequence[Tensor]
    dropped: Sequence[str]
    duplicate: str | None


def plan(source: Source, config: nn.DecoderConfig) -> Plan:
    """Accounts for every tensor of a source and of a decoder by name and shape; reads none.

    Raises:
      ConversionError: A tensor is missing, has another shape, or has no place in the decoder.
    """
    expected = layout(config)
    scorers = [tensor for tensor in expected if tensor.is_scorer]
    # A file either comes with all scorers of the attention asked for, or gets all of them anew.
    new = [] if any(tensor.name in source.tensors for tensor in scorers) else scorers
    stored = []
    for tensor in expected:
        if tensor in new:
            continue
        found = source.tensors.get(tensor.name)
        if found is None:
            raise ConversionError(
                f"{source.path}: tensor {tensor.name} of shape {tensor.shape} is missing"
            )
        if found.shape != tensor.shape:
            raise ConversionError(
                f"{source.path}: tensor {tensor.name} has shape {found.shape}; expected "
                f"{tensor.shape}"
            )
        stored.append((tensor, found))
    everywhere = dataclasses.replace(config.attention, kind="sparsek", pattern=())
    useless = {t.name for t in layout(dataclasses.replace(config, attention=everywhere))}
    extra = source.tensors.keys() - {tensor.name for tensor in expected}
    dropped = [name for name in extra if _BUFFER.fullmatch(name) or name in useless]
    extra -= set(dropped)
    duplicate = next((name for name in _OUTPUTS if name in extra), None)
    if duplicate and config.tie_embeddings:
        extra.remove(duplicate)
    if extra:
        raise ConversionError(
            f"{source.path}: tensor {min(extra)} of shape {source.tensors[min(extra)].shape} has "
            f"no place in a {source.config['model_type']} model with this config.json"
        )
    return Plan(stored, new, sorted(dropped), duplicate)


def read_parameters(source: Source, config: nn.DecoderConfig, plan: Plan, *, seed: int) -> Params:
    """Reads what was planned; at any time there is one tensor beside the parameters.

    Args:
      source: Where from.
      config: Of the decoder.
      plan: Of the same two.
      seed: Of the new scorers.

    Returns:
      float32 parameters on the host's first CPU device, by name.

    Raises:
      ConversionError: The file is damaged, a tensor holds what is not finite, or a stored output
        projection differs from the embedding it is tied to.
    """
    device = jax.local_devices(backend="cpu")[0]
    params = {}
    for tensor, stored in plan.stored:
        array = _read(source, tensor.name, stored)
        if plan.duplicate and tensor.params == ("embedding",):
            other = _read(source, plan.duplicate, source.tensors[plan.duplicate])
            if not np.array_equal(array, other):
                raise ConversionError(
                    f"{source.path}: tensor {plan.duplicate} differs from {tensor.name}; expected "
                    "the same, since config.json says tie_word_embeddings"
                )
        for name, part in zip(tensor.params, tensor.split(array), strict=True):
            params[name] = jax.device_put(_lasting_copy(part), device)
    if plan.new:
        with jax.default_device(device):
            params |= _new_scorers(config, seed)
    return params


def _read(source: Source, name: str, stored: StoredTensor) -> np.ndarray:
    with reading(source.path, f"tensor {name} of shape {stored.shape}"):
        array = stored.read()
    if not np.isfinite(array).all():
        raise ConversionError(
            f"{source.path}: tensor {name} holds numbers that are not finite; expected none"
        )
    return array


def _lasting_copy(array: np.ndarray) -> np.ndarray:
    """A contiguous float32 copy in pages of its own, which JAX uses as they are on a CPU.

    On the heap, parameters and the temporaries between them would leave holes worth a third of the
    model.
    """
    pages = mmap.mmap(-1, 4 * max(array.size, 1))
    copy = np.frombuffer(pages, np.float32, array.size).reshape(array.shape)
    copy[...] = array
    return copy


def _new_scorers(config: nn.DecoderConfig, seed: int) -> Params:
    """Scorers as a new decoder has them.

    Not zero: scores that are all alike would have no variance, and TimestepNorm divides by its root
    (plus 1e-5), so that the first updates would be hundreds of times too large.
    """
    attention, rngs = config.attention, nnx.Rngs(seed)
    params = {}
    for i in range(config.num_layers):
        if not has_scorer(attention.layer_kind(i)):
            continue
        scorer = nn.ScoringNetwork(
            config.d_model,
            1 if attention.shared_scores else attention.num_kv_heads,
            timestep_norm=attention.timestep_norm,
            score_scale=attention.score_scale,
            slope=attention.slope,
            learned_slope=attention.learned_slope,
            rngs=rngs,
        )
        prefix = f"layers.{i}.attention.scorer"
        params[f"{prefix}.kernel"] = jnp.asarray(scorer.kernel[...])
        if scorer.norm is not None:
            params[f"{prefix}.norm.gain"] = jnp.asarray(scorer.norm.gain[...])
        if scorer.head_slope is not None:
            params[f"{prefix}.head_slope"] = jnp.asarray(scorer.head_slope[...])
    return params
