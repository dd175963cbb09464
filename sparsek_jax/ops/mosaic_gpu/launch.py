"""Running a kernel."""

from collections.abc import Callable
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
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
    compiled = plgpu.kernel(kernel, compiler_params=_COMPILER_PARAMS, **settings)
    # Kernels do not say over which axes of a `shard_map` their results vary: all that inputs do.
    return [varying_like(x, *operands) for x in compiled(*operands)]
