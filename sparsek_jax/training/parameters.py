"""A model's parameters as a flat dict of names, which sharding rules and checkpoints address."""

import dataclasses
from typing import Any

import jax
from flax import nnx

Params = dict[str, jax.Array]


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
