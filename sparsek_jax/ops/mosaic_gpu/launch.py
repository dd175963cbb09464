"""Running a kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu.utils import thread_idx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Int32

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
    by_thread: bool = False,
    **settings: Any,
) -> list[Array]:
    """Runs a kernel, with `specialised` on two computing warpgroups and a loading one.

    Args:
      kernel: Of references to operands, results and scratch, in this order.
      operands: What it reads.
      specialised: Whether its warpgroups differ in what they do.
      by_thread: Whether each of a block's 128 threads is on its own, tells itself from others by
        `thread_index`, and does not read what others write.
      **settings: Of `plgpu.kernel`.

    Returns:
      What it writes.
    """
    if specialised:
        settings |= {"num_threads": WARPGROUPS + 1, "thread_name": "warpgroup"}
    # Else all threads of a warp would have to reach every access to memory.
    params = dataclasses.replace(_COMPILER_PARAMS, unsafe_no_auto_barriers=by_thread)
    run = _in_warps(kernel) if by_thread else kernel
    call = plgpu.kernel(run, compiler_params=params, **settings)
    # Code of single warps refuses what varies over axes of a `shard_map`: traced without operands'
    # types, kernels do not know of them. Their results vary over all axes that operands do.
    traced = jax.make_jaxpr(call)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
    return [varying_like(x, *operands) for x in jaxpr_as_fun(traced)(*operands)]


def _in_warps(kernel):
    @functools.wraps(kernel)
    def run(*refs):
        pl.kernel(functools.partial(kernel, *refs), mesh=plgpu.WarpMesh(axis_name="warp"))()

    return run


@plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
def _thread_index(_):
    return FragmentedArray.splat(thread_idx(), shape=(), is_signed=True)


def thread_index() -> Int32[Array, ""]:
    """Which of a block's threads this is, from 0, in a kernel that runs `by_thread`.

    What follows from it differs between the threads of a warp, where Pallas has the same numbers in
    all. Each thread then goes its own way through branches and loops, as any CUDA thread does.
    """
    return _thread_index()
