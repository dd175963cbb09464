"""A model's parameters as a flat dict of names, which sharding rules and checkpoints address."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from sparsek_jax import nn

Params = dict[str, jax.Array]

# Of an attention layer, whatever its kind.
_SHARED_BY_KINDS = {"query", "key", "value", "out", "query_norm", "key_norm"}


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """Everything of an NNX model except its parameters.

    Attributes:
      graphdef: The modules.
      treedef: Of the state that belongs to them.
      abstract: Shape and dtype of every parameter, by names such as
        "layers.0.attention.query.kernel", in the order of the state's leaves.
    """

    graphdef: nnx.GraphDef
    treedef: Any
    abstract: dict[str, jax.ShapeDtypeStruct]

    def merge(self, params: Params) -> nnx.Module:
        """The model with these parameters; usable inside `jax.jit`."""
        leaves = [params[name] for name in self.abstract]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def split(model: nnx.Module) -> tuple[ModelDefinition, Params]:
    """Splits a model into its definition and its parameters by name."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    names = [".".join(str(key) for key in path) for path, _ in nnx.to_flat_state(state)]
    params = dict(zip(names, leaves, strict=True))
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    return ModelDefinition(graphdef, treedef, abstract), params


def define(make_model) -> ModelDefinition:
    """Definition of the model that `make_model()` would build, without computing anything."""
    return split(nnx.eval_shape(make_model))[0]


def is_scorer(name: str) -> bool:
    """Whether a parameter is one of a scoring network."""
    return ".scorer." in name


def is_of_kind(name: str) -> bool:
    """Whether a parameter belongs to one kind of attention, as scorers do, and others lack it."""
    _, found, rest = name.partition(".attention.")
    return bool(found) and rest.split(".")[0] not in _SHARED_BY_KINDS


def layers_of(name: str, config: nn.DecoderConfig) -> Int[np.ndarray, "..."] | None:
    """The layers that a parameter of a decoder belongs to.

    Returns:
      A scalar; with `scan_layers` the layer of every entry of the first dimension; None if the
      parameter belongs to no layer.
    """
    if not name.startswith("layers."):
        return None
    layer, _ = _layer(name)
    if not config.scan_layers:
        return np.array(layer)
    return np.arange(layer, config.num_layers, config.period)


def unstack_layers(params: Params, config: nn.DecoderConfig) -> Params:
    """The parameters of every layer by themselves, as without `scan_layers`.

    Args:
      params: Of a decoder; arrays of NumPy become views.
      config: Of that decoder.
    """
    if not config.scan_layers:
        return params
    unstacked = {}
    for name, array in params.items():
        if not name.startswith("layers."):
            unstacked[name] = array
            continue
        offset, rest = _layer(name)
        for repeat, part in enumerate(array):
            unstacked[f"layers.{repeat * config.period + offset}.{rest}"] = part
    return unstacked


def stack_layers(params: Params, config: nn.DecoderConfig) -> Params:
    """Undoes `unstack_layers`.

    Args:
      params: Of every layer by itself.
      config: Of the decoder that they are for.
    """
    if not config.scan_layers:
        return params
    stacked, repeats = {}, {}
    for name, array in params.items():
        if not name.startswith("layers."):
            stacked[name] = array
            continue
        layer, rest = _layer(name)
        repeat, offset = divmod(layer, config.period)
        repeats.setdefault(f"layers.{offset}.{rest}", {})[repeat] = array
    for name, parts in repeats.items():
        stacked[name] = jnp.stack([parts[repeat] for repeat in sorted(parts)])
    return stacked


def _layer(name: str) -> tuple[int, str]:
    _, index, rest = name.split(".", 2)
    return int(index), rest
