"""Running a kernel."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

from sparsek_jax.ops.mosaic_gpu.layouts import WARPGROUPS
from sparsek_jax.ops.tracing import varying_like

_COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)


def launch(
    kernel: Callable[..., None],
    *,
    operands: tuple[Array, ...],
    specialised: bool = False,
    **settings: Any,
) -> list[Array]:
    """Runs a kernel, with `specialised` on two computing warpgroups and a loading one.

    Args:
      kernel: Of references to operands, results and scratch, in this order.
      operands: What it reads.
      specialised: Whether its warpgroups differ in what they do.
      **settings: Of `plgpu.kernel`.

    Returns:
      What it writes.
    """
    if specialised:
        settings |= {"num_threads": WARPGROUPS + 1, "thread_name": "warpgroup"}
    call = plgpu.kernel(kernel, compiler_params=_COMPILER_PARAMS, **settings)
    # Code of single warps refuses what varies over axes of a `shard_map`: traced without operands'
    # types, kernels do not know of them. Their results vary over all axes that operands do.
    traced = jax.make_jaxpr(call)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
    return [varying_like(x, *operands) for x in jaxpr_as_fun(traced)(*operands)]
