"""The kernel that follows chains, which tell keys' places in lists (ops/lifetimes.py)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from sparsek_jax.ops.mosaic_gpu.launch import launch_by_place

_STEPS = 256  # of a thread at most: nearly always all there are


def chain_starts(previous: Int32[Array, "R M"]) -> Int32[Array, "R M"]:
    """`lifetimes.chain_starts`: each launch goes up to `_STEPS` keys back."""
    length = previous.shape[1]
    reached = 1
    while reached < length:
        (previous,) = launch_by_place(chains, (previous,), [previous])
        reached *= _STEPS
    return previous


# The kernel is named like it, and benchmarks/attention.py knows it.
def chains(operands, row, key, outs):
    """Writes where a key's chain begins, or is after some steps."""
    (previous,), (out,) = operands, outs

    def goes_on(state):
        key, before, steps = state
        return (key != before) & (steps < _STEPS)

    def step(state):
        _, before, steps = state
        return before, previous[row, before], steps + 1

    first = previous[row, key]
    _, out[row, key], _ = lax.while_loop(goes_on, step, (key, first, jnp.int32(1)))
