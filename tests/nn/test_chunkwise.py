"""How rows are cut into blocks, and blocks into chunks, and what a state hands on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax.nn.alternatives import chunkwise
from sparsek_jax.nn.alternatives.sparsek_linear import linear_attention


@pytest.mark.parametrize(
    ("length", "blocks"), [(1, 1), (4, 1), (5, 2), (32, 8), (33, 5), (64, 8), (65, 6)]
)
def test_chunks_are_of_like_size(monkeypatch, length, blocks):
    monkeypatch.setattr(chunkwise, "_FLOATS", 8 * 2 * 4 * 3)
    seen = []

    def attend(state, x, start, rows):
        seen.append(x.shape)
        state = state[:, None, None] + jnp.cumsum(x.reshape(2, -1), axis=1).reshape(x.shape)
        return state[:, -1, -1], jnp.where(rows >= start, state, -1)

    x = np.arange(2 * length, dtype=np.float32).reshape(2, length)
    start = np.zeros((2, length), int)
    out, state = chunkwise.scan_blocks(attend, jnp.zeros(2), [x], start, 4, 3)
    assert set(seen) == {(2, blocks, 4)}
    np.testing.assert_array_equal(out, np.cumsum(x, axis=1))
    np.testing.assert_array_equal(state, x.sum(axis=1))


def test_pairs_of_one_chunk_at_a_time_are_in_memory(monkeypatch):
    def loss(*arrays):
        exists = jnp.ones((1, 4096, 1), bool)
        start = jnp.zeros((1, 4096), jnp.int32)
        state = jnp.zeros((1, 1, 8, 9))
        return linear_attention(*arrays, exists, start=start, state=state)[0].sum()

    def temporary_bytes(floats):
        monkeypatch.setattr(chunkwise, "_FLOATS", floats)
        x = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1) < temporary_bytes(1 << 30) / 4


def test_states_hand_on_what_is_left_and_no_nan_where_nothing_is():
    left = np.array([[0.5, 1.0, 0.0, 0.25]], np.float32)[..., None]
    added = np.array([[1.0, np.nan, 3.0, 5.0]], np.float32)[..., None]
    before, last = chunkwise.add_to_states(left, added, np.array([[2.0]], np.float32))
    np.testing.assert_array_equal(before[0, :, 0], [2.0, 2.0, np.nan, 3.0])
    np.testing.assert_array_equal(last, [[5.75]])
