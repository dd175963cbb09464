"""Running a kernel."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu.utils import thread_idx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Int32

from sparsek_jax.ops.mosaic_gpu.layouts import BLOCK, WARPGROUPS
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


def launch_by_place(
    function: Callable[..., None],
    operands: tuple[Array, ...],
    outs: Sequence[jax.ShapeDtypeStruct | Array],
) -> list[Array]:
    """Runs a function by single threads, one for each place of the rows of what it writes.

    Args:
      function: Of references to operands, a row, a place in it, and references to results. The
        kernel is named like it.
      operands: What it reads.
      outs: Like what it writes; the first has axes for rows and places.

    Returns:
      What it writes.
    """
    num_rows, length = outs[0].shape

    @functools.wraps(function)
    def kernel(*refs):
        block, row = (lax.axis_index(x) for x in ("block", "row"))
        place = block * BLOCK + thread_index()

        @pl.when(place < length)
        def _():
            function(refs[: len(operands)], row, place, refs[len(operands) :])

    return launch(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
        # Rows last: only of these there may be more than 65,535.
        grid=(-(-length // BLOCK), num_rows),
        grid_names=("block", "row"),
        operands=operands,
        by_thread=True,
    )


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
