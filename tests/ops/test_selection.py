import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsek_jax import causal_selection
from sparsek_jax.ops.descent import thresholds_of_prefixes
from sparsek_jax.ops.pruning import capacities, may_matter
from tests.ops import oracle

SCORES = {
    "gaussian": lambda rng, n: rng.normal(size=n),
    "near_constant": lambda rng, n: rng.normal(size=n) * 1e-3,
    "rising": lambda rng, n: np.sort(rng.normal(size=n)),
    "falling": lambda rng, n: np.sort(rng.normal(size=n))[::-1],
    "tied": lambda rng, n: np.round(rng.normal(size=n) * 2) / 2,
    "all_equal": lambda rng, n: np.full(n, -0.3),
    "heavy_tailed": lambda rng, n: np.clip(rng.standard_cauchy(size=n), -1e3, 1e3),
    "negative": lambda rng, n: rng.normal(size=n) - 5,
}


def make_scores(kind, length, seed=0):
    return SCORES[kind](np.random.default_rng(seed), length).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def select(scores, k, window, segment_ids=None):
    return causal_selection(scores, num_selected=k, sliding_window=window, segment_ids=segment_ids)


def check_against_oracle(scores, selection, k, window, segment_ids, queries):
    """Compares one row, scores `[T]`, at the given queries, all of its lists, and lifetimes."""
    length = len(scores)
    u = scores.astype(np.float64)
    cutoff_score, cutoff_index, tau, candidates = (
        np.asarray(x)
        for x in (
            selection.cutoff_score[0, :, 0],
            selection.cutoff_index[0, :, 0],
            selection.tau[0, :, 0],
            selection.candidates[0, :, 0],
        )
    )
    starts = oracle.document_starts(segment_ids, length)
    for t in queries:
        pool = oracle.pool(t, starts[t], window)
        if len(pool) <= k:
            assert (cutoff_score[t], cutoff_index[t], tau[t]) == (-np.inf, length, -np.inf)
            continue
        kth = oracle.selected(u, pool, k)[-1]
        assert (cutoff_score[t], cutoff_index[t]) == (scores[kth], kth)
        gates = np.clip(u[pool] - np.float64(tau[t]), 0, 1)
        # Half a float32 spacing of tau, and of u - 1, is inherent.
        np.testing.assert_allclose(
            gates, oracle.sparsek(u[pool], k), atol=1e-6 + 2e-7 * abs(tau[t])
        )
    until, slot = (np.asarray(x[0, :, 0]) for x in selection.lifetimes)
    for t in queries:
        seen = oracle.selected(u, oracle.pool(t, starts[t], window), k)
        seen = np.union1d(seen, np.arange(max(t - window + 1, starts[t]), t + 1)).astype(int)
        np.testing.assert_array_equal(np.flatnonzero(until[: t + 1] > t), seen)
    for chunk, t in enumerate(range(0, length, selection.chunk_size)):
        chosen = oracle.selected(u, oracle.pool(t, starts[t], window), k)
        expected = np.full(min(k, length), -1)
        expected[slot[chosen]] = chosen
        assert np.sum(expected >= 0) == len(chosen)
        np.testing.assert_array_equal(candidates[chunk], expected)


def packed(length, seed=0):
    rng = np.random.default_rng(seed)
    cuts = rng.choice(np.arange(1, length), size=min(3, length - 1), replace=False)
    ids = np.zeros(length, np.int32)
    ids[cuts] = 1
    # Ids need not be sorted: the last document has the first one's id.
    ids = np.cumsum(ids).astype(np.int32)
    return np.where(ids == ids.max(), 0, ids).astype(np.int32)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("documents", ["no ids", "one", "several"])
def test_long_rows(kind, documents):
    length, k, window = 4096, 48, 32
    scores = make_scores(kind, length)
    # Whatever fills up a pruned row must not come before the keys with the lowest scores.
    scores[-1] = 5
    segment_ids = packed(length) if documents == "several" else np.zeros(length, np.int32)
    given = None if documents == "no ids" else segment_ids[None]
    selection = select(scores[None, :, None], k, window, given)
    queries = np.random.default_rng(1).integers(0, length, 300)
    check_against_oracle(scores, selection, k, window, segment_ids, queries)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("is_packed", [False, True])
def test_pruning_keeps_what_matters(kind, is_packed):
    length, k = 3000, 20
    scores = make_scores(kind, length)
    segment_ids = packed(length) if is_packed else np.zeros(length, np.int32)
    starts = oracle.document_starts(segment_ids, length)
    kept = np.asarray(may_matter(scores, jnp.asarray(starts, jnp.int32), k))
    u = scores.astype(np.float64)
    for t in range(0, length, 7):
        pool = oracle.pool(t, starts[t], 0)
        if kept[t]:
            continue
        # Its first pool is where a key has the largest gate it ever has.
        assert t not in pool[oracle.sparsek(u[pool], k) > 0]
        assert t not in oracle.selected(u, pool, k)
    if kind in ("gaussian", "falling", "heavy_tailed") and not is_packed:
        assert kept.sum() < capacities(k, length)[0]


@pytest.mark.parametrize(("length", "k"), [(3, 1), (40, 6), (600, 20), (5000, 64)])
def test_levels_at_once_equal_one_after_the_other(length, k):
    scores = jnp.asarray(np.stack([make_scores(kind, length) for kind in SCORES]))
    segment_ids = np.broadcast_to(packed(length), scores.shape)
    starts = np.stack([oracle.document_starts(ids, length) for ids in segment_ids])
    # Documents begin anew where the reversed row's end.
    ends = length - np.stack([oracle.document_starts(x[::-1], length)[::-1] for x in segment_ids])
    bounds = [jnp.asarray(x, jnp.int32) for x in (starts, ends)]

    def find(at_once):
        search = functools.partial(thresholds_of_prefixes, packed=True, at_once=at_once)
        return jax.jit(search, static_argnums=3)(scores, *bounds, k)

    for x, y in zip(find(True), find(False), strict=True):
        np.testing.assert_array_equal(x, y)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(list(SCORES)),
    shape=st.sampled_from(
        [
            (1, 1, 0),
            (1, 3, 2),
            (7, 1, 0),
            (63, 5, 0),
            (100, 7, 9),
            (131, 130, 0),
            (65, 64, 1),
            (90, 4, 100),
            (90, 200, 3),
            (257, 20, 1),
        ]
    ),
    is_packed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_query_of_short_rows(kind, shape, is_packed, seed):
    length, k, window = shape
    scores = make_scores(kind, length, seed)
    segment_ids = packed(length, seed) if is_packed else np.zeros(length, np.int32)
    selection = select(scores[None, :, None], k, window, segment_ids[None])
    check_against_oracle(scores, selection, k, window, segment_ids, range(length))


def test_exactly_k_under_ties():
    scores = make_scores("all_equal", 50)
    selection = select(scores[None, :, None], 4, 0)
    np.testing.assert_array_equal(selection.cutoff_index[0, 4:, 0], 3)
    np.testing.assert_allclose(selection.tau[0, 4:, 0], -0.3 - 4 / np.arange(5, 51), atol=1e-7)


def test_rows_and_heads_are_independent():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 70, 2)).astype(np.float32)
    segment_ids = np.stack([packed(70, seed) for seed in range(3)])
    together = select(scores, 6, 5, segment_ids)
    for b in range(3):
        for h in range(2):
            alone = select(scores[b : b + 1, :, h : h + 1], 6, 5, segment_ids[b : b + 1])
            np.testing.assert_array_equal(alone.tau[0, :, 0], together.tau[b, :, h])
            np.testing.assert_array_equal(alone.candidates[0, :, 0], together.candidates[b, :, h])


def test_rows_that_need_different_room():
    length, k, window = 256, 2, 5
    needed = {0: 0, 30: 1, 100: 2, 250: 3}  # The last: all keys.
    select_alone = jax.jit(jax.vmap(lambda row: select(row[None, :, None], k, window)))
    # How many of a row's last keys score higher and higher, and so are all kept by pruning.
    for rising in ((0, 0, 0, 0), (0, 30, 0, 0), (0, 30, 100, 0), (30, 250, 100, 0)):
        rise = np.arange(length) - length + np.array(rising)[:, None]
        rows = make_scores("falling", length) + np.maximum(rise, 0).astype(np.float32)
        starts = jnp.zeros(length, jnp.int32)
        kept = [np.sum(may_matter(row, starts, k)) for row in rows]
        assert [np.searchsorted(capacities(k, length), n) for n in kept] == [
            needed[x] for x in rising
        ]
        together, alone = select(rows[..., None], k, window), select_alone(rows)
        for i, row in enumerate(rows):
            of_batch = jax.tree.map(lambda x, i=i: x[i : i + 1], together)
            for selection in (of_batch, jax.tree.map(lambda x, i=i: x[i], alone)):
                documents = np.zeros(length, int)
                check_against_oracle(row, selection, k, window, documents, range(length))


def test_packing_does_not_change_a_document():
    scores = make_scores("gaussian", 120)
    segment_ids = np.repeat(np.arange(3, dtype=np.int32), 40)
    row = select(scores[None, :, None], 7, 3, segment_ids[None])
    for i in range(3):
        alone = select(scores[None, 40 * i : 40 * (i + 1), None], 7, 3)
        rows = slice(40 * i, 40 * (i + 1))
        np.testing.assert_array_equal(alone.cutoff_score[0], row.cutoff_score[0, rows])
        # Contracted multiply-adds may round the last bit of tau differently.
        np.testing.assert_allclose(alone.tau[0], row.tau[0, rows], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("window", [0, 5])
def test_gradient_of_the_gates(kind, window):
    """Against every query's closed form, s * (g - mean of g over s), in float64."""
    length, k = 150, 9
    scores = make_scores(kind, length)
    segment_ids = packed(length)
    starts = oracle.document_starts(segment_ids, length)
    g = np.random.default_rng(3).normal(size=(length, length))
    in_pool = np.zeros((length, length), bool)
    expected = np.zeros(length)
    for t in range(length):
        pool = oracle.pool(t, starts[t], window)
        in_pool[t, pool] = True
        gates = oracle.sparsek(scores[pool], k)
        interior = (gates > 1e-6) & (gates < 1 - 1e-6)
        if np.any(interior):
            expected[pool[interior]] += g[t, pool[interior]] - np.mean(g[t, pool[interior]])

    def loss(scores):
        tau = select(scores[None, :, None], k, window, segment_ids[None]).tau[0, :, 0]
        distance = scores - tau[:, None]
        # `jnp.clip` passes half of the gradient at its corners, which ties hit exactly.
        interior = in_pool & (distance > 0) & (distance < 1)
        return jnp.sum(jnp.where(interior, distance, 0) * g)

    gradient = jax.jit(jax.grad(loss))(scores)
    assert np.linalg.norm(gradient - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(("size", "k"), [(30, 4), (64, 2)])  # Of the latter some keys are pruned.
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_score_marks_its_pool_only(bad, size, k):
    scores = make_scores("gaussian", 2 * size)
    ids = np.repeat([0, 1], size)[None]
    clean = select(scores[None, :, None], k, 2, ids).tau[0, :, 0]
    at = size + 10
    scores[at] = bad
    tau = select(scores[None, :, None], k, 2, ids).tau[0, :, 0]
    np.testing.assert_array_equal(np.isnan(tau), np.arange(2 * size) >= at + 2)
    np.testing.assert_array_equal(tau[: at + 2], clean[: at + 2])


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (2, 5, 0), (0, 200, 2)])
def test_nothing_is_selected_from_nothing(shape, is_packed):
    scores = jnp.zeros(shape, jnp.bfloat16)
    ids = jnp.zeros(shape[:2], jnp.int32) if is_packed else None
    selection, vjp = jax.vjp(lambda scores: select(scores, 2, 1, ids), scores)
    full = jax.eval_shape(lambda: select(jnp.ones([max(n, 1) for n in shape]), 2, 1))
    for x, y in zip(jax.tree.leaves(selection), jax.tree.leaves(full), strict=True):
        assert (x.ndim, x.dtype, x.size) == (y.ndim, y.dtype, 0)
    chunks = -(-shape[1] // selection.chunk_size)
    assert selection.candidates.shape == (shape[0], chunks, shape[2], min(2, shape[1]))
    (gradient,) = vjp(selection)
    assert (gradient.shape, gradient.dtype) == (shape, jnp.bfloat16)


def test_time_and_memory_do_not_grow_with_the_square_of_length():
    def cost(length):
        scores = jax.ShapeDtypeStruct((1, length, 2), jnp.float32)
        analysis = select.lower(scores, 32, 32).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert cost(4096) < 4.5 * cost(1024)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_selected": 0}, ValueError, "num_selected=0 must be at least 1"),
        ({"num_selected": 2.0}, TypeError, "num_selected must be an int, got 2.0"),
        ({"sliding_window": -1}, ValueError, "sliding_window=-1 must be at least 0"),
        ({"scores": jnp.ones((2, 3))}, ValueError, r"scores must have shape \[B, T, K\]"),
        ({"scores": jnp.ones((2, 3, 1), int)}, TypeError, "scores must be a floating-point"),
        ({"segment_ids": jnp.ones((2, 4), int)}, ValueError, "segment_ids must have shape"),
        ({"segment_ids": jnp.ones((2, 3))}, TypeError, "segment_ids must be an integer array"),
        ({"scores": [[[1.0]]]}, TypeError, r"scores must be a floating-point array, got \[\[\["),
        ({"segment_ids": [[1]]}, TypeError, r"segment_ids must be an integer array, got \[\[1\]\]"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"scores": jnp.ones((2, 3, 1)), "num_selected": 1} | change
    with pytest.raises(error, match=message):
        causal_selection(arguments.pop("scores"), **arguments)
