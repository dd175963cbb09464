"""Linear attention in the chunkwise form: pairs within blocks of tokens, states between blocks."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Shaped

from sparsek_jax.nn.causal import join_chunks, split_chunks
from sparsek_jax.ops.tracing import varying_like

# Numbers of one array that are in memory at a time. Many blocks at a time spare a GPU launches.
_FLOATS = 1 << 25


def scan_blocks(
    attend: Callable[..., tuple[Array, Array]],
    state: Array,
    arrays: Sequence[Shaped[Array, "B T ..."]],
    start: Int[Array, "B T"],
    size: int,
    floats_of_token: int,
) -> tuple[Shaped[Array, "B T ..."], Array]:
    """Runs a recurrence over blocks of rows, of which some at a time are in memory.

    Args:
      attend: Maps the state and blocks of the arrays, of `start` and of the rows' numbers, each
        `[B, blocks, size, ...]`, to the state after them and to such outputs. It is computed again
        in the backward pass.
      state: The first one.
      arrays: Of all rows; the last blocks are filled up with zeros.
      start: First row of every row's document, which what fills the last blocks belongs to.
      size: Rows of a block.
      floats_of_token: Numbers of the largest array that `attend` makes, for a token of one row.

    Returns:
      The outputs of all rows, and the last state.
    """
    batch, length = start.shape
    most = max(_FLOATS // (batch * size * floats_of_token), 1)
    # Chunks of like size, so that the last one is hardly filled up.
    num_blocks = -(-length // size)
    chunk_size = size * -(-num_blocks // -(-num_blocks // most))
    padding = -length % chunk_size
    rows = jnp.broadcast_to(jnp.arange(length + padding), (batch, length + padding))
    padded = (jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2))) for x in arrays)
    inputs = (*padded, start, rows)

    @jax.checkpoint
    def attend_chunk(state, chunk):
        blocks = (x.reshape(batch, -1, size, *x.shape[2:]) for x in chunk)
        state, out = attend(state, *blocks)
        return state, out.reshape(batch, chunk_size, *out.shape[3:])

    chunks = tuple(split_chunks(x, chunk_size) for x in inputs)
    state, out = jax.lax.scan(attend_chunk, varying_like(state, *inputs), chunks)
    return join_chunks(out)[:, :length], state


def add_to_states(
    left: Float32[Array, "B blocks *#state"],
    added: Float32[Array, "B blocks *state"],
    state: Float32[Array, "B *state"],
) -> tuple[Float32[Array, "B blocks *state"], Float32[Array, "B *state"]]:
    """The states before every block, and the one after the last.

    Args:
      left: What every block leaves of the state, as a factor.
      added: What it then adds.
      state: Before the first.
    """
    total, after = jax.lax.associative_scan(_after, (left, added), axis=1)
    after = after + _left_of(state[:, None], total)
    return jnp.concatenate([state[:, None], after[:, :-1]], axis=1), after[:, -1]


def _after(earlier, later):
    """What is left of a state, and what is added to it, after two runs of blocks."""
    (left, added), (left_later, added_later) = earlier, later
    return left * left_later, _left_of(added, left_later) + added_later


def _left_of(state, left):
    """Where nothing is left, a NaN is not either: one document must not reach the next."""
    return jnp.where(left == 0, 0.0, state * left)
