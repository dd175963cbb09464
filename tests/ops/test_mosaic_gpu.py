"""What of the GPU kernels can be checked without a GPU: arithmetic, which tiles, and lowering.

Their results are checked on a GPU, by the suite that all implementations share.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsek_jax import sparsek_attention
from sparsek_jax.ops import lifetimes
from sparsek_jax.ops.block_config import TUNED, BlockConfig, tuned
from sparsek_jax.ops.breakpoints import Sums, fixed_point
from sparsek_jax.ops.descent import thresholds_of_prefixes
from sparsek_jax.ops.gating import GATINGS
from sparsek_jax.ops.mosaic_gpu import chains, launch, sort, table, thresholds, walk
from sparsek_jax.ops.mosaic_gpu import edges as edge_kernel
from sparsek_jax.ops.mosaic_gpu.chunk_sums import sum_over_chunks
from sparsek_jax.ops.mosaic_gpu.operands import Settings
from sparsek_jax.ops.mosaic_gpu.spans import tile_span
from sparsek_jax.ops.mosaic_gpu.tile import tile_cotangents, tile_gates
from sparsek_jax.ops.pruning import capacities
from sparsek_jax.ops.selection import Search, SelectionSettings, document_bounds, find_selection
from tests.ops.test_selection import SCORES, make_scores, packed

CONFIG = Settings(
    chunk_size=128,
    list_size=100,
    window=20,
    scale=0.3,
    gating="soft",
    packed=False,
    configs=tuned(64),
)


def make_tile(seed=0, rows=12, columns=40, size=5):
    """Queries at positions 30 to 41 and keys at 0 to 39, all in the slab."""
    rng = np.random.default_rng(seed)
    query, d_out = rng.normal(size=(2, rows, size)).astype(np.float32)
    key, value = rng.normal(size=(2, columns, size)).astype(np.float32)
    score = rng.normal(size=columns).astype(np.float32)
    tau = np.sort(rng.normal(size=rows)).astype(np.float32) - 1
    position = np.arange(columns, dtype=np.int32)
    until = rng.integers(position + CONFIG.window, 60).astype(np.int32)
    return query, key, value, score, tau, position, until, d_out


def make_gates(config, kind, score, tau, position, until):
    shape = (len(tau), len(score))
    query_position = np.broadcast_to(30 + np.arange(len(tau))[:, None], shape)
    query = (query_position, np.broadcast_to(tau[:, None], shape))
    key = tuple(np.broadcast_to(x, shape) for x in (position, score, until))
    return tile_gates(config, kind, query, key, with_interior=True)


@pytest.mark.parametrize("kind", ["slab", "list", "window"])
@pytest.mark.parametrize("gating", GATINGS)
def test_tile_arithmetic_equals_autodiff(kind, gating):
    config = CONFIG._replace(gating=gating)
    query, key, value, score, tau, position, until, d_out = make_tile()
    if kind == "list":
        position, until = position - 100, until - 10
    elif kind == "window":
        position = np.zeros_like(position)
    query_position = 30 + np.arange(len(tau))[:, None]

    def attend(query, key, value, score, tau):
        attended, gate = jnp.ones((len(tau), len(score)), bool), 1.0
        if kind != "window":
            attended = (position <= query_position) & (query_position < until)
            in_pool = query_position >= position + config.window
            gate = jnp.clip(score - tau[:, None], -1e9, 1)
            if gating == "straight_through":
                interior = (gate > 0) & (gate < 1)
                gate = jnp.where(interior, gate, 1) + jax.lax.stop_gradient(
                    1 - jnp.where(interior, gate, 1)
                )
            gate = jnp.where(in_pool, gate, 1)
        logits = query @ key.T * config.scale
        if gating in ("soft", "straight_through"):
            logits *= gate
        terms = jnp.where(attended, jnp.exp(logits), 0)
        total = jnp.sum(terms * gate if gating == "soft_weights" else terms, axis=1)
        return terms * gate / total[:, None] @ value, jnp.log(total)

    if kind != "window":
        # A selected key's gate is positive; keep the tile so.
        score = np.maximum(score, tau.max() + 0.05)
    arrays = (query, key, value, score, tau)
    (out, lse), vjp = jax.vjp(attend, *arrays)
    expected = vjp((d_out, jnp.zeros_like(lse)))

    gates = make_gates(config, kind, score, tau, position, until)
    weights, d_logits, d_gate = tile_cotangents(
        config,
        gates,
        query @ key.T,
        d_out @ value.T,
        (lse * np.log2(np.e))[:, None],
        (out * d_out).sum(1)[:, None],
    )
    found = (config.scale * d_logits @ key, config.scale * d_logits.T @ query, weights.T @ d_out)
    if d_gate is None:
        assert kind == "window"
        found += (jnp.zeros_like(score), jnp.zeros_like(tau))
    else:
        found += (d_gate.sum(0), -d_gate.sum(1))
    np.testing.assert_allclose(weights @ value, out, atol=1e-5)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_a_query_s_nan_reaches_only_keys_that_it_attends_to():
    query, key, value, score, tau, position, until, d_out = make_tile()
    tau[3] = np.nan
    gates = make_gates(CONFIG, "slab", score, tau, position, until)
    lse, delta = np.ones((len(tau), 1)), np.ones((len(tau), 1))
    lse[3] = delta[3] = np.nan
    for x in tile_cotangents(CONFIG, gates, query @ key.T, d_out @ value.T, lse, delta):
        assert np.all(np.isfinite(x[~gates.attended]))
    assert np.all(np.isfinite(np.delete(x, 3, axis=0)))


@settings(max_examples=80)
@given(
    length=st.integers(16, 400).map(lambda n: 8 * n),
    chunk_size=st.sampled_from([128, 256, 512]),
    window=st.integers(0, 700),
    list_size=st.integers(1, 600),
    block=st.integers(0, 24),
    columns=st.sampled_from([64, 128]),
    packed=st.booleans(),
)
def test_tiles_cover_every_key_once(length, chunk_size, window, list_size, block, columns, packed):
    first = block * 128 % length // 128 * 128
    config = CONFIG._replace(
        chunk_size=chunk_size, window=window, list_size=list_size, packed=packed
    )
    span = tile_span(config, jnp.int32(first), length, columns)
    span = type(span)(*(int(x) for x in span))
    chunk = first // chunk_size * chunk_size
    last = min(first + 127, length - 1)
    # The slab's keys are these; tiles may hold more, which are masked.
    assert 0 <= span.slab * columns <= max(chunk - window + 1, 0)
    assert span.end * columns > last
    assert (span.end - 1) * columns < length
    assert span.num_listed * columns >= min(max(chunk - window + 1, 0), list_size)
    assert span.slab <= span.window <= span.diagonal <= span.end
    for tile in range(span.window, span.diagonal):
        # Every query of the block has all of these in its window.
        assert tile * columns > first + 127 - window
        assert (tile + 1) * columns - 1 <= first


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "k", "window", "length", "gating", "packed", "dtype"),
    [
        (12, 12, 64, 512, 512, 2048, "soft", False, "bfloat16"),
        (16, 2, 128, 1024, 512, 2048, "soft", False, "bfloat16"),
        (9, 3, 80, 100, 0, 1001, "straight_through", True, "bfloat16"),
        (6, 2, 64, 100, 30, 600, "soft_values", True, "bfloat16"),
        (6, 2, 64, 100, 30, 600, "soft_weights", True, "bfloat16"),
        (4, 1, 96, 7, 9, 65, "soft", True, "float16"),
        (2, 2, 60, 64, 64, 300, "soft", False, "float16"),
        (2, 1, 64, 64, 64, 2048, "soft", False, "bfloat16"),
        (2, 1, 64, 64, 64, 2048, "soft", True, "bfloat16"),
    ],
)
def test_lowers_to_cuda(heads, kv_heads, head_dim, k, window, length, gating, packed, dtype):
    def gradients(query, key, value, scores, segment_ids):
        def loss(*arrays):
            out = sparsek_attention(
                *arrays,
                num_selected=k,
                sliding_window=window,
                gating=gating,
                segment_ids=segment_ids,
                implementation="mosaic_gpu",
            )
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, scores)

    query = jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype)
    key = jax.ShapeDtypeStruct((2, length, kv_heads, head_dim), dtype)
    scores = jax.ShapeDtypeStruct((2, length, kv_heads), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((2, length), jnp.int32) if packed else None
    export = jax.export.export(jax.jit(gradients), platforms=["cuda"])
    module = export(query, key, key, scores, segment_ids).mlir_module()
    # Forward, query, two key kernels, and the sums over chunks; the walk, if keys are pruned.
    assert module.count("mosaic_gpu_v2") >= 5 + bool(capacities(min(k, length), length))


@pytest.mark.parametrize("num_chunks", [1, 3, 7])
def test_sums_over_chunks(num_chunks):
    """The one kernel without wgmma, and so the one that runs in Mosaic's interpret mode."""
    rng = np.random.default_rng(num_chunks)
    shape = (2, 2, num_chunks, 128)
    candidates = rng.integers(-1, 3, shape).astype(np.int32)
    per_chunk = [
        rng.normal(size=(*shape, 64)),
        rng.normal(size=(*shape, 64)),
        rng.normal(size=shape),
    ]
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    of_lists = [
        jnp.asarray(x, dtype).reshape(*shape[:2], -1, *x.shape[4:])
        for x, dtype in zip(per_chunk, dtypes, strict=True)
    ]
    with plgpu.force_gpu_interpret_mode():
        found = sum_over_chunks(of_lists, jnp.asarray(candidates))
    for x, of_list in zip(found, of_lists, strict=True):
        total = np.array(of_list, np.float64).reshape(*shape, -1)
        for chunk in range(1, num_chunks):
            same = candidates[:, :, chunk] == candidates[:, :, chunk - 1]
            total[:, :, chunk] += np.where(same[..., None], total[:, :, chunk - 1], 0)
        # Running sums are float32; only what is written is rounded.
        tolerance = 4e-3 if x.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(
            np.asarray(x, np.float64).reshape(total.shape), total, rtol=tolerance, atol=tolerance
        )


class _Bounded:
    """An array of which nothing out of bounds is read or written, and nothing is written twice."""

    def __init__(self, x):
        self.x, self.written = np.array(x), np.zeros(np.shape(x), bool)

    def at(self, index):
        index = tuple(int(i) for i in (index if isinstance(index, tuple) else (index,)))
        assert all(0 <= i < n for i, n in zip(index, self.x.shape, strict=True))
        return index

    def __getitem__(self, index):
        return jnp.asarray(self.x[self.at(index)])

    def __setitem__(self, index, value):
        index = self.at(index)
        assert not self.written[index]
        self.x[index], self.written[index] = value, True

    @property
    def shape(self):
        return self.x.shape


def plain_rows(u, start, end, bits, *, packed):
    """`sort_rows` by definition, with at least one place more that is no key."""
    del packed
    place = np.arange(u.shape[1] + sort.UNIT - u.shape[1] % sort.UNIT)
    padding = ((0, 0), (0, len(place) - u.shape[1]))
    u = jnp.pad(u, padding, constant_values=np.finfo(np.float32).min)
    start, end = (jnp.where(place < x.shape[1], jnp.pad(x, padding), place) for x in (start, end))
    key = jnp.lexsort((-u, start), axis=1).astype(jnp.int32)
    by_rank = jnp.take_along_axis(u, key, 1)
    rank = jnp.argsort(key, axis=1).astype(jnp.int32)
    scores = fixed_point(by_rank, bits), fixed_point(u, bits)
    num_keys = jnp.sum(end > place, axis=1, dtype=jnp.int32)
    return sort.SortedRows(key, by_rank, *scores[0], rank, *scores[1], start, end, num_keys)


def each_in_a_loop(function, operands, outs):
    """`launch_by_place` on any device, key after key."""

    def kernel(*refs):
        place = pl.program_id(0), pl.program_id(1)
        function(refs[: len(operands)], *place, refs[len(operands) :])

    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs]
    grid = outs[0].shape
    return pl.pallas_call(kernel, out_shape=outs, grid=grid, interpret=True)(*operands)


def each_in_bounds(function, operands, outs):
    """`launch_by_place` step by step."""
    operands = [_Bounded(x) for x in operands]
    outs = [_Bounded(np.zeros(x.shape, x.dtype)) for x in outs]
    with jax.disable_jit():
        for row, place in np.ndindex(outs[0].shape):
            function(operands, row, jnp.int32(place), outs)
    assert all(np.all(out.written) for out in outs)
    return [jnp.asarray(out.x) for out in outs]


@pytest.mark.parametrize(
    ("length", "piece", "searches", "each"),
    [
        (1, 256, 8, each_in_a_loop),
        (7, 1, 3, each_in_a_loop),
        (300, 256, 8, each_in_a_loop),
        (300, 8, 4, each_in_a_loop),
        (9, 4, 2, each_in_bounds),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_sorts_rows(monkeypatch, length, piece, searches, each, is_packed):
    monkeypatch.setattr(sort, "launch_by_place", each)
    monkeypatch.setattr(sort, "_PIECE", piece)
    monkeypatch.setattr(sort, "_SEARCHES", searches)
    rng = np.random.default_rng(length)
    few = rng.integers(-1, 2, length)
    u = np.stack([rng.normal(size=length), few, few * -0.0]).astype(np.float32)
    u[:, length // 2] = np.finfo(np.float32).min
    segment_ids = jnp.broadcast_to(packed(length), u.shape) if is_packed else None
    start, end = document_bounds(segment_ids, *u.shape)
    place = np.arange(length)
    num_keys = np.array([length, -(-length // 2), 1])
    is_key = place < num_keys[:, None]
    u = jnp.where(is_key, u, np.finfo(np.float32).min)
    end = jnp.minimum(end, num_keys[:, None])
    start, end = (jnp.where(is_key, x, place) for x in (start, end))
    rows, expected = (
        sorts(u, start, end, 15, packed=is_packed) for sorts in (sort.sort_rows, plain_rows)
    )
    np.testing.assert_array_equal(rows.num_keys, num_keys)
    for found, x in zip(rows[:-1], expected[:-1], strict=True):
        np.testing.assert_array_equal(found[:, :length], x[:, :length])
    np.testing.assert_array_equal(rows.rank[:, length:], np.indices(rows.rank.shape)[1][:, length:])


@pytest.mark.parametrize("each", [each_in_a_loop, each_in_bounds, None])
@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_follows_chains(monkeypatch, each, length):
    """By the kernel, and where there is none."""
    monkeypatch.setattr(chains, "launch_by_place", each)
    monkeypatch.setattr(chains, "_STEPS", 3)
    key = np.arange(length)
    previous = np.stack([np.maximum(key - 1, 0), np.maximum(key - key % 7, 0), key])
    previous[1, length // 2 :] = np.random.default_rng(0).integers(key[length // 2 :] + 1)
    expected = previous
    for _ in key:
        expected = np.take_along_axis(expected, previous, axis=1)
    find = chains.chain_starts if each else lifetimes.chain_starts
    np.testing.assert_array_equal(find(jnp.asarray(previous, jnp.int32)), expected)


def plain_edges(settings, rows):
    """`find_edges` by definition."""
    num_keys, places = rows.num_keys[:, None], np.arange(rows.u.shape[1])
    stretch = np.arange(1, settings.num_stretches + 1)
    rank = jnp.minimum(settings.stretch(num_keys) * stretch, num_keys)
    at = jnp.minimum(rank, num_keys - 1)
    key, here = (jnp.take_along_axis(x, at, 1) for x in (rows.key, rows.u))
    first, stop = (jnp.take_along_axis(x, key, 1)[..., None] for x in (rows.start, rows.end))
    scores, here = rows.u[:, None], here[..., None]

    def others(is_above):
        is_above = (places < first) | ((places < stop) & is_above)
        return jnp.where(rank == num_keys, num_keys, jnp.sum(is_above, -1)).astype(jnp.int32)

    closed, opened = others(scores - 1.0 > here), others(scores >= here - 1.0)
    return edge_kernel.Edges(jnp.concatenate([rank, opened], 1), jnp.concatenate([closed, rank], 1))


def edges_in_bounds(settings, rows):
    """`find_edges` step by step."""
    shapes = jax.eval_shape(lambda: edge_kernel.find_edges(settings, rows))
    outs = [_Bounded(np.zeros(x.shape, np.int32)) for x in shapes]
    bounded = jax.tree.map(_Bounded, rows)
    with jax.disable_jit():
        for row, edge in np.ndindex(shapes.opened.shape):
            edge_kernel.find_edge(settings, bounded, row, jnp.int32(edge), outs)
    assert all(np.all(out.written) for out in outs)
    found, expected = edge_kernel.Edges(*(out.x for out in outs)), plain_edges(settings, rows)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    return jax.tree.map(jnp.asarray, found)


def plain_table(settings, rows, edges):
    """`make_table` by definition."""
    opens, closes = (rows.rank[..., None] < x[:, None] for x in (edges.opened, edges.closed))
    above = jnp.stack(
        [
            opens * (1 + (1 << 16)) - closes,
            opens * rows.key_high[..., None]
            + closes * ((1 << settings.bits) - rows.key_high[..., None]),
            (opens ^ closes) * rows.key_low[..., None],
        ]
    ).astype(jnp.int32)
    before = jnp.cumsum(above, axis=2) - above
    begins = settings.chunk(rows.num_keys)[:, None] * np.arange(settings.num_chunks)
    begins = jnp.minimum(begins, rows.rank.shape[1] - 1)[..., None]
    nothing = jnp.zeros((*edges.opened.shape, settings.num_chunks), jnp.int32)
    return table.Table(
        jnp.stack([jnp.take_along_axis(x, begins, 1) for x in before]), jnp.stack([nothing] * 3)
    )


def has_keys(settings, num_keys, chunk):
    return chunk * settings.chunk(num_keys) < num_keys


def walk_in_a_loop(settings, *inputs):
    """`walk` on any device, chunk after chunk."""
    operands, treedef = jax.tree.flatten(inputs)
    rows, _, sums = inputs

    def kernel(*refs):
        inputs, outs = treedef.unflatten(refs[: len(operands)]), refs[len(operands) :]
        row, chunk = pl.program_id(0), pl.program_id(1)

        @pl.when(has_keys(settings, inputs[0].num_keys[row], chunk))
        def _():
            walk.walk_to_tau(settings, *inputs, row, chunk, outs[:-1])
            walk.walk_to_kth(settings, *inputs, row, chunk, outs[-1])

    shapes = [jax.ShapeDtypeStruct(rows.rank.shape, jnp.int32)] * 5
    grid = len(rows.rank), sums.in_group.shape[2]
    call = pl.pallas_call(kernel, out_shape=shapes, grid=grid, interpret=True)
    below, *sums, kth = call(*operands)
    return below, Sums(*sums), kth


def check_walk(scores, segment_ids, k):
    """Thresholds equal those that the tree finds, of all pools where they are used."""
    bounds = document_bounds(segment_ids, *scores.shape)
    is_packed = segment_ids is not None
    found, expected = (
        jax.jit(functools.partial(search, packed=is_packed), static_argnums=3)(scores, *bounds, k)
        for search in (thresholds.thresholds_by_walking, thresholds_of_prefixes)
    )
    num_older = np.arange(scores.shape[1]) - np.asarray(bounds[0])
    has_k, exceeds_k = num_older >= min(k, scores.shape[1] - 1) - 1, num_older >= k
    np.testing.assert_array_equal(np.asarray(found[1])[has_k], np.asarray(expected[1])[has_k])
    # Both are rounded.
    tau = (np.asarray(x[0])[exceeds_k] for x in (found, expected))
    np.testing.assert_allclose(*tau, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize(("length", "k"), [(1, 1), (40, 6), (600, 20), (700, 1)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_walking_finds_what_the_tree_does(monkeypatch, length, k, is_packed):
    monkeypatch.setattr(thresholds, "sort_rows", plain_rows)
    monkeypatch.setattr(thresholds, "find_edges", plain_edges)
    monkeypatch.setattr(thresholds, "make_table", plain_table)
    monkeypatch.setattr(thresholds, "walk", walk_in_a_loop)
    scores = jnp.asarray(np.stack([make_scores(kind, length) for kind in SCORES]))
    segment_ids = jnp.broadcast_to(packed(length), scores.shape) if is_packed else None
    check_walk(scores, segment_ids, k)


def table_in_bounds(settings, rows, edges):
    """`make_table` step by step."""
    shapes = jax.eval_shape(lambda: table.make_table(settings, rows, edges))
    outs = [_Bounded(np.zeros(x.shape, np.int32)) for x in shapes]
    _, num_rows, num_edges, num_groups = shapes.before.shape
    inputs = jax.tree.map(_Bounded, (rows, edges))
    with jax.disable_jit():
        for place in np.ndindex(num_rows, num_groups, num_edges):
            table.add_up(settings, *inputs, jnp.asarray(place, jnp.int32), *outs)
    chunks = np.arange(settings.num_chunks)
    of_keys = np.asarray(has_keys(settings, rows.num_keys[:, None], chunks))
    assert np.all(outs[0].written == of_keys[:, :, None])
    assert np.all(outs[1].written)
    in_group, totals = (out.x for out in outs)
    found = table.Table(in_group, np.cumsum(totals, axis=3) - totals)
    before = found.before[..., chunks // -(-settings.num_chunks // table._GROUPS)]
    whole = in_group + np.swapaxes(before, 2, 3)
    expected = plain_table(settings, rows, edges).in_group
    np.testing.assert_array_equal(whole[:, of_keys], expected[:, of_keys])
    return found


def walk_in_bounds(settings, *inputs):
    """`walk` step by step."""
    rows, edges, sums = jax.tree.map(_Bounded, inputs)
    outs = [_Bounded(jnp.zeros_like(inputs[0].rank)) for _ in range(5)]
    num_keys = np.asarray(inputs[0].num_keys)
    with jax.disable_jit():
        for row, chunk in np.ndindex(len(num_keys), settings.num_chunks):
            if has_keys(settings, num_keys[row], chunk):
                place = row, jnp.int32(chunk)
                walk.walk_to_tau(settings, rows, edges, sums, *place, outs[:-1])
                walk.walk_to_kth(settings, rows, edges, sums, *place, outs[-1])
    is_key = np.arange(inputs[0].rank.shape[1]) < num_keys[:, None]
    assert all(np.array_equal(out.written, is_key) for out in outs)
    below, *sums, kth = (jnp.asarray(out.x) for out in outs)
    return below, Sums(*sums), kth


@pytest.mark.parametrize(
    ("kind", "length", "num_keys"),
    [
        ("gaussian", 30, [30]),
        ("tied", 32, [32]),
        ("near_constant", 30, [30]),
        ("tied", 30, [17, 1]),
    ],
)
def test_walking_stays_in_bounds(monkeypatch, kind, length, num_keys):
    monkeypatch.setattr(thresholds, "sort_rows", plain_rows)
    monkeypatch.setattr(thresholds, "find_edges", edges_in_bounds)
    monkeypatch.setattr(thresholds, "make_table", table_in_bounds)
    monkeypatch.setattr(thresholds, "walk", walk_in_bounds)
    monkeypatch.setattr(walk, "_FAR", 3)
    monkeypatch.setattr(table, "_GROUPS", 3)
    for module in (sort, edge_kernel, table, thresholds):
        monkeypatch.setattr(module, "UNIT", 4)
    monkeypatch.setattr(thresholds, "_STRETCH", 4)
    place, num_keys = np.arange(length), np.array(num_keys)[:, None]
    start, end = document_bounds(jnp.asarray(packed(length))[None], 1, length)
    is_key = place < num_keys
    end = jnp.where(is_key, jnp.minimum(end, num_keys), place)
    start = jnp.where(is_key, start, place)
    scores = jnp.where(is_key, make_scores(kind, length), np.finfo(np.float32).min)
    found, expected = (
        search(scores, start, end, 3, packed=True)
        for search in (thresholds.thresholds_by_walking, thresholds_of_prefixes)
    )
    asked = place - np.asarray(start) >= 3
    np.testing.assert_array_equal(np.asarray(found[1])[asked], np.asarray(expected[1])[asked])


def select(scores, segment_ids, **settings):
    """The selection of 20 keys and a window of 10, or of other `settings`."""
    settings = {"num_selected": 20, "window": 10, "chunk_size": 128} | settings
    settings = SelectionSettings(packed=segment_ids is not None, **settings)
    documents = document_bounds(segment_ids, *scores.shape[:2])
    return find_selection(settings, scores, documents, lambda selection: selection)


BY_KERNELS = Search(thresholds.thresholds_by_walking, chains.chain_starts)


@pytest.mark.parametrize("is_packed", [False, True])
def test_selects_by_walking_in_the_first_room(monkeypatch, is_packed):
    """Of a row without documents, the keys left fit in either room, of one with them in one."""
    calls = []
    monkeypatch.setattr(thresholds, "sort_rows", plain_rows)
    monkeypatch.setattr(thresholds, "find_edges", plain_edges)
    monkeypatch.setattr(thresholds, "make_table", plain_table)
    monkeypatch.setattr(thresholds, "walk", lambda *x: calls.append(x) or walk_in_a_loop(*x))
    monkeypatch.setattr(chains, "launch_by_place", each_in_a_loop)
    length = 600
    scores = np.stack([make_scores(kind, length) for kind in ("gaussian", "heavy_tailed")], -1)
    scores[50, 0] = np.nan
    segment_ids = jnp.asarray(packed(length))[None] if is_packed else None
    scores = jnp.asarray(scores)[None]

    def run(**settings):
        # Compiled as one, a selection takes a fraction of what its operations would.
        return jax.jit(functools.partial(select, num_selected=8, **settings))(scores, segment_ids)

    expected = run()
    for room in (128, 256):
        found = run(first_room=BY_KERNELS, longest_first_room=room)
        _, rows, *_ = calls.pop()
        assert not calls
        assert room <= rows.rank.shape[1] < 2 * room
        check_selections(found, expected)


def check_selections(found, expected):
    np.testing.assert_allclose(found.tau, expected.tau, rtol=3e-7, atol=3e-7)
    found, expected = (dataclasses.replace(x, tau=jnp.zeros(())) for x in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_sorting_and_walking_in_warps(monkeypatch):
    monkeypatch.setattr(thresholds, "make_table", plain_table)
    # As if warps had one thread each.
    monkeypatch.setattr(walk, "_THREADS", 1)
    for module in (launch, walk):
        monkeypatch.setattr(module, "thread_index", lambda: jax.lax.axis_index("warp"))
        monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(sort, "_PIECE", 16)
    scores = jnp.asarray(make_scores("gaussian", 70)[None])
    with plgpu.force_gpu_interpret_mode():
        check_walk(scores, None, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gaussian", "rising", "tied", "heavy_tailed"])
@pytest.mark.parametrize("length", [5000, 40000])
@pytest.mark.parametrize("is_packed", [False, True])
def test_selects_what_other_devices_do(kind, length, is_packed):
    scores = jnp.asarray(make_scores(kind, 3 * length).reshape(1, length, 3))
    segment_ids = jnp.asarray(packed(length))[None] if is_packed else None
    found, expected = (
        jax.jit(functools.partial(select, num_selected=300, **settings))(scores, segment_ids)
        for settings in (
            {"first_room": BY_KERNELS, "longest_first_room": thresholds.LONGEST},
            {"first_room": Search(thresholds_of_prefixes)},
        )
    )
    check_selections(found, expected)


@pytest.mark.gpu
def test_addresses_beyond_int32():
    """A call of 2^31 query elements: its last KV head's share, which is addressed the furthest."""
    length, heads, kv_heads, size = 262_144, 64, 4, 128
    group = heads // kv_heads
    key = jax.random.key(0)
    query = jax.random.normal(key, (1, length, heads, size), "bfloat16")
    scores = jax.random.normal(jax.random.key(1), (1, length, kv_heads))

    @jax.jit
    def run(query, key, value, scores):
        def attend(*arrays):
            return sparsek_attention(
                *arrays, num_selected=64, sliding_window=64, implementation="mosaic_gpu"
            )

        out, vjp = jax.vjp(attend, query, key, value, scores)
        # XLA adds up rows of output times cotangent before the kernels see them, in an order that
        # its autotuner chooses for each program; of one term a row the sum is exact.
        d_out = jax.nn.one_hot(jnp.arange(length) % size, size, dtype=out.dtype)
        return out, *vjp(jnp.broadcast_to(d_out[None, :, None], out.shape))

    arrays = (query, query[:, :, 1::group], query[:, :, 2::group], scores)
    found = run(*arrays)
    alone = run(query[:, :, -group:], *(x[:, :, -1:] for x in arrays[1:]))
    again = run(*arrays)
    *exact, d_scores = (x[:, :, -y.shape[2] :] for x, y in zip(found, alone, strict=True))
    for name, x, y in zip(("out", "dq", "dk", "dv"), exact, alone[:4], strict=True):
        assert jnp.array_equal(x, y), name
    # Heads' gradients of tau are added up by XLA, too. One wrong row, of 2^18, would be about 2^-9
    # of the norm.
    assert jnp.linalg.norm(d_scores - alone[4]) <= 1e-3 * jnp.linalg.norm(alone[4])
    names = ("out", "dq", "dk", "dv", "dscores")
    for name, x, y, z in zip(names, found, alone, again, strict=True):
        assert jnp.array_equal(x, z), name
        assert jnp.any(y[:, length // 2 :] != 0), name


@pytest.mark.parametrize("shared", [False, True])
def test_lowers_inside_shard_map(shared):
    # Types vary over axes of one device too.
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = P("data", None, "tensor", None)
    of_scores = P("data", None, None if shared else "tensor")
    attend = jax.shard_map(
        functools.partial(
            sparsek_attention,
            num_selected=64,
            sliding_window=32,
            implementation="mosaic_gpu",
            return_until=True,
        ),
        mesh=mesh,
        in_specs=(rows, rows, rows, of_scores),
        out_specs=(rows, of_scores),
    )

    def gradients(*arrays):
        def loss(*arrays):
            return jnp.sum(attend(*arrays)[0].astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    length = 2048
    assert capacities(64, length)
    query = jax.ShapeDtypeStruct((4, length, 8, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((4, length, 4, 64), jnp.bfloat16)
    scores = jax.ShapeDtypeStruct((4, length, 1 if shared else 4), jnp.float32)
    exported = jax.export.export(jax.jit(gradients), platforms=["cuda"])(query, key, key, scores)
    assert exported.mlir_module().count("mosaic_gpu_v2") >= 6


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        ("float32", 64, "query has dtype float32; expected bfloat16 or float16"),
        ("bfloat16", 160, "query has head size 160; expected at most 128"),
    ],
)
def test_says_what_it_does_not_support(dtype, head_dim, reason):
    x = jnp.ones((1, 4, 1, head_dim), dtype)
    with pytest.raises(NotImplementedError, match=f"implementation='mosaic_gpu': {reason}"):
        sparsek_attention(x, x, x, jnp.ones((1, 4, 1)), num_selected=1, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("columns", "stages", "message"),
    [(96, 2, "columns=96 must be 64 or 128"), (64, 1, "stages=1 must be at least 2")],
)
def test_impossible_blocks_are_refused(columns, stages, message):
    with pytest.raises(ValueError, match=message):
        BlockConfig(columns=columns, stages=stages)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_every_head_size_has_configs(head_dim):
    assert tuned(head_dim) is TUNED[64 if head_dim <= 64 else 128]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there may be kernels")
def test_says_which_device_it_has_no_kernels_for():
    x = jnp.ones((1, 4, 1, 64), "bfloat16")
    with pytest.raises(NotImplementedError, match="implementation='mosaic_gpu': no kernels for"):
        sparsek_attention(x, x, x, jnp.ones((1, 4, 1)), num_selected=1, implementation="mosaic_gpu")
