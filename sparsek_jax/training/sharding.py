"""Where parameters and batches live on a mesh with the axes data, fsdp and tensor.

Rows of a batch are split over data and fsdp. Weight matrices are split over fsdp along the residual
stream's width and over tensor along heads or MLP channels; everything else is replicated.
"""

import math
import re
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))

# The end of a parameter's name, and how its trailing dimensions are split.
_RULES = (
    (r"(query|key|value|gate|up)\.kernel", ("fsdp", "tensor")),
    (r"(query|key|value|gate|up)\.bias", ("tensor",)),
    (r"(out|down)\.kernel", ("tensor", "fsdp")),
    (r"embedding|output", ("tensor", "fsdp")),
)


def make_mesh(shape: Mapping[str, int]) -> Mesh:
    """Mesh over all devices, with the size of each axis given by `shape`."""
    sizes = tuple(shape[axis] for axis in AXES)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the parameter (or optimizer moment) of that name is split.

    A dimension that its mesh axis does not divide stays whole, and so do the leading dimensions
    that scanned layers add.
    """
    for pattern, axes in _RULES:  # noqa: B007
        if re.search(rf"(^|\.)({pattern})$", name):
            break
    else:
        return PartitionSpec()
    leading = len(shape) - len(axes)
    fits = [
        axis if size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape[leading:], strict=True)
    ]
    return PartitionSpec(*[None] * leading, *fits)


def tree_shardings(tree, mesh: Mesh):
    """Sharding of every leaf of a tree whose innermost dict keys are parameter names."""

    def leaf_sharding(path, leaf):
        names = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        spec = partition_spec(names[-1], leaf.shape, mesh) if names else PartitionSpec()
        return NamedSharding(mesh, spec if math.prod(leaf.shape) > 1 else PartitionSpec())

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)
