"""Attention over blocks, against masks written from the definitions one query at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import AttentionConfig, BigBirdAttention, MobaAttention, causal
from sparsek_jax.nn.alternatives.blocks import whole_blocks
from sparsek_jax.nn.alternatives.selection import uniform_numbers
from tests.nn.masks import assert_close, masked, with_gradients
from tests.ops.oracle import document_starts

CONFIG = AttentionConfig(
    num_heads=6, num_kv_heads=2, head_dim=5, rotary_fraction=0.8, num_selected=12, sliding_window=6,
    block_size=3,
)  # fmt: skip
LENGTH = 53
# The id 1 comes back: a later document of the same id is another document.
IDS = np.array([np.repeat([1, 2, 1], [9, 1, 43]), np.repeat([0, 1, 1], [31, 2, 20])])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(causal, "_DENSE_CHUNK", {"xla": 8, "cudnn": 8})


def make(kind, **changes):
    return kind(dataclasses.replace(CONFIG, **changes), 8, rngs=nnx.Rngs(0))


def starts(ids, length):
    """First row of the document of every row, `[B, T]`."""
    return np.array([document_starts(row, length) for row in ids])


def rows(blocks, start, size):
    return [start + block * size + i for block in blocks for i in range(size)]


def best(scores, count):
    """Of a dict of scores, the keys of the highest ones, the earlier of equals."""
    return sorted(scores, key=lambda block: (-scores[block], block))[:count]


def bigbird_mask(config, query, key, start):
    size, window = config.block_size, config.sliding_window
    count = config.num_selected // size
    num_global = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2}[count]
    drawn = random_numbers()
    mask = np.zeros((len(query), 2, LENGTH + size, LENGTH + size), bool)
    for b, h, t in np.ndindex(len(query), 2, query.shape[1]):
        own, s = (t - start[b, t]) // size, start[b, t]
        # Blocks that begin before the window of the last query of this block.
        pool = [c for c in range(num_global, own) if c * size <= own * size + size - 1 - window]
        chosen = best({c: drawn[own, c, h] for c in pool}, count - num_global)
        chosen += range(num_global)
        mask[b, h, t, rows(chosen, s, size)] = True
        mask[b, h, t, max(s, t - window + 1) : t + 1] = True
        mask[b, h, t, t + 1 :] = False
    return mask[:, :, : query.shape[1], : query.shape[1]]


@functools.cache
def random_numbers():
    """By block of the query, block and KV head; of layer 1."""
    number = jnp.arange(LENGTH)
    return np.asarray(uniform_numbers(1, number[:, None], number, num_heads=2))


def moba_mask(config, query, key, start):
    size = config.block_size
    count = (config.num_selected + config.sliding_window) // size - 1
    batch, length, num_heads, _ = query.shape
    mask = np.zeros((batch, num_heads, length, length), bool)
    for b, n, t in np.ndindex(batch, num_heads, length):
        own, s = (t - start[b, t]) // size, start[b, t]
        means = {c: key[b, rows([c], s, size), n // 3].mean(axis=0) for c in range(own)}
        chosen = best({c: query[b, t, n] @ mean for c, mean in means.items()}, count)
        mask[b, n, t, rows(chosen, s, size)] = True
        mask[b, n, t, s + own * size : t + 1] = True
    return mask


MASKS = {BigBirdAttention: bigbird_mask, MobaAttention: moba_mask}


def inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, heads, 5) for heads in (6, 2, 2, 6)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@jax.jit
def expected(mask, *arrays):
    return with_gradients(lambda *qkv: masked(*qkv, mask), *arrays)


@pytest.mark.parametrize(
    ("kind", "length", "changes", "packed"),
    [
        (BigBirdAttention, LENGTH, {}, True),
        (BigBirdAttention, 29, {"num_selected": 3, "sliding_window": 1}, False),
        (MobaAttention, LENGTH, {}, True),
        (MobaAttention, 29, {"num_selected": 6, "sliding_window": 0}, False),
        (MobaAttention, 2, {}, False),
    ],
)
def test_outputs_and_gradients_are_those_of_masks(kind, length, changes, packed):
    layer, arrays = make(kind, **changes), inputs(length)
    ids = IDS[:, :length] if packed else np.zeros((2, length), int)
    x = jnp.zeros((2, length, 8))

    @jax.jit
    def run(*arrays):
        def attend(*qkv):
            return layer.mix(x, *qkv, jnp.asarray(ids) if packed else None, None, 1)[0]

        return with_gradients(attend, *arrays)

    wide = [array.astype(np.float64) for array in arrays]
    mask = MASKS[kind](layer.config, *wide[:2], starts(ids, length))
    # Neither more keys than the budget nor only the newest.
    assert length == 2 or (mask.sum(axis=3).max() <= 18 and mask[:, :, -1, :-12].any())
    with jax.enable_x64(True):
        truth = expected(mask, *wide)
    assert_close(run(*arrays), truth)


@pytest.mark.parametrize("size", [1, 3, 4, 60])
def test_blocks_are_whole_and_of_one_document(size):
    start = starts(IDS, LENGTH)
    blocks = whole_blocks(jnp.asarray(start), size)
    for b in range(2):
        begins = [t for t in range(LENGTH - size + 1) if start[b, t + size - 1] == start[b, t]]
        begins = [t for t in begins if (t - start[b, t]) % size == 0]
        of_row = np.full(LENGTH, -1)
        for block, begin in enumerate(begins):
            of_row[begin : begin + size] = block
        np.testing.assert_array_equal(blocks.begin[b, : len(begins)], begins)
        np.testing.assert_array_equal(blocks.begin[b, len(begins) :], LENGTH)
        np.testing.assert_array_equal(blocks.of_row[b], of_row)


@pytest.mark.parametrize("kind", MASKS)
def test_memory_is_linear_in_length(kind, monkeypatch):
    monkeypatch.setattr(causal, "_DENSE_CHUNK", {"xla": 64})
    graphdef, params = nnx.split(make(kind, num_selected=48, sliding_window=48, block_size=16))

    def temporary_bytes(length):
        def loss(params, x, ids):
            return nnx.merge(graphdef, params)(x, segment_ids=ids).sum()

        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(params, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 4.5 * temporary_bytes(1024)
