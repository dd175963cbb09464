"""Attention over blocks, against masks written from the definitions one query at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import (
    AttentionConfig,
    BigBirdAttention,
    GatedLinearAttention,
    LshAttention,
    MobaAttention,
    NativeSparseAttention,
)
from sparsek_jax.nn.alternatives import blocks, tiles
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
    monkeypatch.setattr(blocks, "_SCORES", 128)
    monkeypatch.setattr(tiles, "_TILE", 4)


def make(kind, **changes):
    return kind(dataclasses.replace(CONFIG, **changes), 8, rngs=nnx.Rngs(0))


def starts(ids, length):
    """First row of the document of every row, `[B, T]`."""
    return np.array([document_starts(row, length) for row in ids])


def rows_of(begins, size):
    return [begin + i for begin in begins for i in range(size)]


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
        mask[b, h, t, rows_of([s + c * size for c in chosen], size)] = True
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
        means = {c: key[b, rows_of([s + c * size], size), n // 3].mean(axis=0) for c in range(own)}
        chosen = best({c: query[b, t, n] @ mean for c, mean in means.items()}, count)
        mask[b, n, t, rows_of([s + c * size for c in chosen], size)] = True
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


def compressed(params, branch, rows):
    """One row for every block of rows of a head, `[M, size, H]`."""
    inner, position, outer = (
        params[f"compress_{branch}"][name] for name in ("inner", "position", "outer")
    )
    hidden = jax.nn.gelu(rows @ inner["kernel"] + position, approximate=False)
    return jnp.mean(rows + hidden @ outer["kernel"], axis=1)


def softmax_over(logits, seen):
    """Rows of softmax over what is seen, zero where nothing is."""
    weights = jnp.where(seen, jnp.exp(logits - jnp.max(logits)), 0)
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)


def nsa(config, params, x, query, key, value, start):
    """One member of the batch; not compiled, as the choice of blocks is made in NumPy."""
    size, (length, num_heads, head_dim) = config.block_size, query.shape
    begins = [t for t in range(length) if (t - start[t]) % size == 0]
    begins = [t for t in begins if t + size <= length and start[t + size - 1] == start[t]]
    t, j, begin = np.arange(length)[:, None], np.arange(length), np.array(begins)
    complete = (begin >= start[:, None]) & (begin + size - 1 <= t)
    own = t - (t - start[:, None]) % size
    out = [None] * num_heads
    for h in range(key.shape[1]):
        keys, values = (
            compressed(params, name, array[begin[:, None] + np.arange(size), h])
            for name, array in (("key", key), ("value", value))
        )
        heads = range(h * num_heads // key.shape[1], (h + 1) * num_heads // key.shape[1])
        logits = {n: query[:, n] @ keys.T / np.sqrt(head_dim) for n in heads}
        weights = {n: softmax_over(logits[n], complete) for n in heads}
        mass = sum(np.asarray(jax.lax.stop_gradient(x)) for x in weights.values())
        selected = (own <= j) & (j <= t)
        for row in range(length):
            past = [m for m in range(len(begins)) if start[row] <= begins[m] < own[row, 0]]
            fixed = {start[row], own[row, 0] - size}
            masses = {m: np.inf if begins[m] in fixed else mass[row, m] for m in past}
            chosen = best(masses, config.num_selected // size - 1)
            selected[row, rows_of([begins[m] for m in chosen], size)] = True
        window = (j <= t) & (j >= start[:, None]) & (j > t - config.sliding_window)
        for n in heads:
            gates = jax.nn.sigmoid(x @ params["gates"]["kernel"])[:, n::num_heads]
            dense = query[:, n] @ key[:, h].T / np.sqrt(head_dim)
            branches = [weights[n] @ values]
            branches += [softmax_over(dense, seen) @ value[:, h] for seen in (selected, window)]
            out[n] = sum(gates[:, [i]] * branch for i, branch in enumerate(branches))
    return jnp.stack(out, axis=1)


@pytest.mark.parametrize(
    ("length", "changes", "packed"),
    [(LENGTH, {}, True), (29, {"num_selected": 3, "num_heads": 2, "sliding_window": 1}, False)],
)
def test_nsa_is_its_three_branches(length, changes, packed):
    layer = make(NativeSparseAttention, **changes)
    query, key, value, weight = inputs(length)
    num_heads = layer.config.num_heads
    query, weight = query[:, :, :num_heads], weight[:, :, :num_heads]
    ids = IDS[:, :length] if packed else np.zeros((2, length), int)
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(layer)
    # Also what starts with zeros.
    state = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), state)
    x = rng.standard_normal((2, length, 8)).astype(np.float32)

    @jax.jit
    def run(state, *arrays):
        def attend(state, *arrays):
            layer = nnx.merge(graphdef, state)
            return layer.mix(*arrays, jnp.asarray(ids) if packed else None, None, 1)[0]

        out, vjp = jax.vjp(attend, state, *arrays)
        return out, vjp(weight)

    def twin(params, *arrays):
        start = starts(ids, length)
        each = [nsa(layer.config, params, *(a[b] for a in arrays), start[b]) for b in range(2)]
        return jnp.stack(each)

    def own(params):
        return {name: params[name] for name in ("gates", "compress_key", "compress_value")}

    params = own(nnx.to_pure_dict(state))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, x, query, key, value))
        out, vjp = jax.vjp(twin, *wide)
        truth = [out, *jax.tree.leaves(vjp(jnp.asarray(weight, jnp.float64)))]
    out, (gradient, *gradients) = run(state, x, query, key, value)
    gradient = own(nnx.to_pure_dict(gradient))
    assert_close([out, *jax.tree.leaves((gradient, *gradients))], truth)


@pytest.mark.parametrize(
    "kind", [*MASKS, NativeSparseAttention, LshAttention, GatedLinearAttention]
)
def test_bfloat16_matches_float32_on_the_same_inputs(kind):
    rng = np.random.default_rng(2)
    shapes = [(2, LENGTH, 16), *((2, LENGTH, heads, 16) for heads in (6, 2, 2))]
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    config = dataclasses.replace(CONFIG, head_dim=16, rotary_fraction=1.0)

    weight = rng.standard_normal(shapes[1]).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype, *arrays):
        def attend(x, *arrays):
            layer = kind(config, 16, dtype=dtype, rngs=nnx.Rngs(0))
            return layer.mix(x, *arrays, jnp.asarray(IDS), None, 1)[0]

        out, vjp = jax.vjp(attend, *(x.astype(dtype) for x in arrays))
        return [out, *vjp(weight.astype(dtype))[1:]]

    outs = (run(jnp.float32, *arrays), run(jnp.bfloat16, *arrays))
    for i, (exact, rough) in enumerate(zip(*outs, strict=True)):
        assert (exact.dtype, rough.dtype) == (jnp.float32, jnp.bfloat16)
        error = jnp.linalg.norm(rough.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
        assert error <= (1e-2 if i else 5e-3), (i, error)


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


@pytest.mark.parametrize("kind", [*MASKS, NativeSparseAttention, LshAttention])
def test_memory_is_linear_in_length(kind, monkeypatch):
    monkeypatch.setattr(blocks, "_SCORES", 4096)
    monkeypatch.setattr(tiles, "_TILE", 16)
    monkeypatch.setattr(tiles, "_PAIRS", 4096)
    graphdef, params = nnx.split(make(kind, num_selected=48, sliding_window=48, block_size=16))

    def temporary_bytes(length):
        def loss(params, x, ids):
            return nnx.merge(graphdef, params)(x, segment_ids=ids).sum()

        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(params, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 4.5 * temporary_bytes(1024)
