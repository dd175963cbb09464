"""The cache against one `sparsek_attention` over the whole sequence, however it is cut."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax import extend_cache, init_cache, reset_cache, sparsek_attention
from sparsek_jax.ops.gating import GATINGS
from tests.ops import oracle
from tests.ops.test_attention import TOLERANCE, Case, errors, make_inputs

CASES = [
    Case(2, 2, 16, 95, 8, 5),
    Case(2, 1, 16, 95, 8, 0),
    Case(2, 3, 16, 57, 7, 1, shared=True),
    # k alone, and k + w, exceed T; w exceeds T.
    Case(1, 2, 16, 57, 70, 3),
    Case(2, 2, 16, 57, 50, 20),
    Case(2, 1, 16, 57, 4, 64),
]
CASE = CASES[0]


def make_cache(case, batch=4, **changes):
    arguments = {
        "num_kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "num_selected": case.k,
        "sliding_window": case.window,
        "shared_scores": case.shared,
    }
    return init_cache(batch, **(arguments | changes))


@jax.jit
def step_through(cache, *arrays):
    """Appends one token after the other."""

    def step(cache, token):
        cache, out = extend_cache(cache, *(x[:, None] for x in token))
        return cache, out[:, 0]

    cache, out = jax.lax.scan(step, cache, [jnp.swapaxes(x, 0, 1) for x in arrays])
    return cache, jnp.swapaxes(out, 0, 1)


def in_chunks(cache, arrays, sizes, implementation="reference"):
    outs, start = [], 0
    for size in sizes:
        chunk = (x[:, start : start + size] for x in arrays)
        cache, out = extend_cache(cache, *chunk, implementation=implementation)
        outs.append(out)
        start += size
    assert start == arrays[0].shape[1]
    return cache, jnp.concatenate(outs, axis=1)


def whole(arrays, case, gating="soft", segment_ids=None):
    return sparsek_attention(
        *arrays,
        num_selected=case.k,
        sliding_window=case.window,
        gating=gating,
        segment_ids=segment_ids,
        implementation="reference",
    )


def error(actual, expected):
    return errors([actual] * 5, [expected] * 5)["out"]


def same_memory(x, y):
    """Whether two caches hold the same, in whatever order."""

    def by_position(cache):
        k = cache.num_selected
        order = jnp.argsort(cache.position[..., :k], axis=-1)
        per_head = functools.partial(jnp.take_along_axis, axis=2)
        rows = jnp.broadcast_to(order[..., None], (*cache.key.shape[:2], k, 1))
        kept = [per_head(x[:, :, :k], rows) for x in (cache.key, cache.value)]
        kept += [per_head(x[..., :k], order) for x in (cache.score, cache.position)]
        ring = [x[:, :, k:] for x in (cache.key, cache.value, cache.score, cache.position)]
        support = [] if cache.support is None else [jnp.sort(cache.support.score, axis=-1)]
        return kept, ring, support, cache.length

    for a, b in zip(jax.tree.leaves(by_position(x)), jax.tree.leaves(by_position(y)), strict=True):
        np.testing.assert_array_equal(a, b)


def run_oracle(arrays, case, gating):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
        return np.asarray(oracle.attention(*wide, k=case.k, window=case.window, gating=gating))


@pytest.mark.parametrize(
    ("case", "gating"),
    [(case, gating) for case in CASES for gating in ("soft", "straight_through")]
    + [(case, gating) for case in CASES[:3] for gating in ("soft_values", "soft_weights")],
    ids=str,
)
def test_steps_and_chunks_match_the_float64_oracle(case, gating):
    """Gaussian scores, some with ties, some with one key that is never dropped."""
    *arrays, _, _ = make_inputs(case)
    empty = make_cache(case, gating=gating)
    expected = run_oracle(arrays, case, gating)
    stepped, out = step_through(empty, *arrays)
    assert error(out, expected) <= 1e-6
    chunked, out = in_chunks(empty, arrays, [19] * (case.length // 19))
    assert error(out, expected) <= 1e-6
    same_memory(stepped, chunked)
    if gating != "straight_through":
        assert stepped.support.num_lost.max() == 0
        np.testing.assert_allclose(stepped.support.tau, chunked.support.tau, rtol=1e-6)


@pytest.mark.parametrize("prompt", [3, 20])
def test_ten_times_as_many_steps_as_the_cache_has_rows(prompt):
    case = CASE._replace(length=prompt + 10 * (CASE.k + CASE.window))
    for seed in (1, 2, 3):
        *arrays, _, _ = make_inputs(case, seed=seed)
        cache, first = in_chunks(make_cache(case), [x[:, :prompt] for x in arrays], [prompt])
        _, rest = step_through(cache, *(x[:, prompt:] for x in arrays))
        assert error(jnp.concatenate([first, rest], axis=1), whole(arrays, case)) <= 1e-6


def test_chunks_by_the_fast_implementation():
    *arrays, _, _ = make_inputs(CASE)
    cache, out = in_chunks(make_cache(CASE), arrays, [19] * 5, implementation="xla")
    assert error(out, whole(arrays, CASE)) <= 1e-6
    same_memory(cache, step_through(make_cache(CASE), *arrays)[0])


@pytest.mark.parametrize("gating", GATINGS)
def test_bfloat16(gating):
    *arrays, _, _ = make_inputs(CASE, jnp.bfloat16)
    expected = whole([x.astype(jnp.float32) for x in arrays], CASE, gating)
    cache = make_cache(CASE, gating=gating, dtype=jnp.bfloat16)
    for _, out in (step_through(cache, *arrays), in_chunks(cache, arrays, [19] * 5)):
        assert out.dtype == jnp.bfloat16
        assert error(out, expected) <= TOLERANCE["bfloat16"]


def special_scores(case):
    """Rows: near-constant, rising near-constant, a few values with ties, all equal."""
    *_, scores, _, _ = make_inputs(case)
    slope = 1e-6 * jnp.arange(case.length)[:, None]
    return jnp.stack(
        [100 + 1e-3 * scores[0], slope + 0 * scores[1], jnp.round(scores[2]), 0 * scores[3]]
    )


@pytest.mark.parametrize(
    ("case", "gating"), [*((CASE, gating) for gating in GATINGS), (CASES[1], "soft")]
)
def test_tied_and_near_constant_scores(case, gating):
    query, key, value, _, _, _ = make_inputs(case)
    arrays = (query, key, value, special_scores(case))
    size = case.length if gating != "straight_through" else None
    cache = make_cache(case, gating=gating, support_size=size)
    stepped, out = step_through(cache, *arrays)
    mixed, mixed_out = in_chunks(cache, arrays, [19] * 5)
    same_memory(stepped, mixed)
    expected = run_oracle(arrays, case, gating)
    assert error(out, expected) <= 1e-6
    # The operator's own tau is rounded to float32, where scores have an offset of 100.
    assert error(mixed_out, whole(arrays, case, gating)) <= 1e-6
    assert error(mixed_out[1:], expected[1:]) <= 1e-6


def test_a_dropped_key_is_told_once_when_it_is_dropped():
    """Also among ties, and a new token that is rejected at once: as the selections change."""
    case = Case(2, 1, 4, 57, 8, 0, shared=True)
    query, key, value, scores, _, _ = make_inputs(case)
    positions = jnp.arange(1, case.length + 1, dtype=key.dtype)[:, None, None]
    key = jnp.broadcast_to(positions, key.shape)
    expected = np.zeros(key.shape[:3], int)
    for b, h in np.ndindex(key.shape[0], key.shape[2]):
        row = np.asarray(scores[b, :, h % scores.shape[2]], np.float64)
        for t in range(1, case.length):
            before, after = (
                oracle.selected(row, oracle.pool(i, 0, case.window), case.k) for i in (t - 1, t)
            )
            # Without a window, the newest may be rejected at once.
            before = {*before, max(t - case.window, 0)} if t >= case.window else set()
            expected[b, t, h] = 1 + max(before - {*after}, default=-1)
    extend = jax.jit(functools.partial(extend_cache, return_dropped=True))
    cache, start, found = make_cache(case), 0, []
    for size in (20, 20, *[1] * (case.length - 40)):
        tokens = (x[:, start : start + size] for x in (query, key, value, scores))
        cache, _, dropped = extend(cache, *tokens)
        np.testing.assert_array_equal(dropped.exists, dropped.key[..., 0] > 0)
        found.append(dropped.key[..., 0])
        start += size
    np.testing.assert_array_equal(jnp.concatenate(found, axis=1), expected)


def test_support_without_room_is_counted_and_bounds_the_gates():
    case = CASE
    query, key, value, _, _, _ = make_inputs(case)
    scores = special_scores(case)
    for extend in (step_through, lambda cache, *x: in_chunks(cache, x, [19] * 5)):
        cache, _ = extend(make_cache(case), query, key, value, scores)
        pool = np.asarray(scores[:, : case.length - case.window], np.float64)
        # In all rows but 2 the pool is in the support: k selected, 4 k remembered.
        expected = np.full((4, 2), pool.shape[1] - 5 * case.k)
        expected[2] = 0
        np.testing.assert_array_equal(cache.support.num_lost, expected)
        gates = np.clip(pool - np.asarray(cache.support.tau)[:, None], 0, 1).sum(axis=1)
        assert (gates <= case.k + cache.support.lost_mass + 1e-4).all()
        exact = [[oracle.tau(pool[b, :, h], case.k) for h in range(2)] for b in range(4)]
        assert (cache.support.tau <= np.array(exact) + 1e-6).all()
        np.testing.assert_allclose(cache.support.tau[2], exact[2], atol=1e-6)


def test_rows_of_different_lengths_with_rubbish_behind_them():
    *arrays, _, _ = make_inputs(CASE)
    counts = np.array([[19, 0, 7, 13], [1, 1, 0, 1], [2, 19, 0, 19], [0, 1, 1, 1], [19, 18, 17, 0]])
    cache, outs = make_cache(CASE), [[] for _ in range(4)]
    for count, size in zip(counts, [19, 1, 19, 1, 19], strict=True):
        start = np.asarray(cache.length)
        chunk = [
            jnp.stack([jnp.roll(x[b], -start[b], axis=0)[:size] for b in range(4)]) for x in arrays
        ]
        beyond = np.arange(size) >= count[:, None]
        chunk = [jnp.where(beyond.reshape(4, size, *[1] * (x.ndim - 2)), jnp.nan, x) for x in chunk]
        previous = cache
        cache, out = extend_cache(
            cache, *chunk, num_tokens=count.astype(np.uint8), implementation="reference"
        )
        for b in range(4):
            outs[b].append(out[b, : count[b]])
            assert (out[b, count[b] :] == 0).all()
            if count[b] == 0:
                jax.tree.map(
                    lambda x, y, b=b: np.testing.assert_array_equal(x[b], y[b]), cache, previous
                )
    np.testing.assert_array_equal(cache.length, counts.sum(axis=0))
    expected = whole(arrays, CASE)
    for b in range(4):
        assert error(jnp.concatenate(outs[b]), expected[b, : counts[:, b].sum()]) <= 1e-6


def test_reset_rows_start_anew_and_leave_the_others_alone():
    *arrays, _, _ = make_inputs(CASE)
    used, _ = step_through(make_cache(CASE), *arrays)
    rows = jnp.array([True, False, True, False])
    cache = reset_cache(used, rows)
    for b in range(4):
        other = used if not rows[b] else make_cache(CASE)
        jax.tree.map(lambda x, y, b=b: np.testing.assert_array_equal(x[b], y[b]), cache, other)
    _, out = step_through(cache, *arrays)
    expected = whole(arrays, CASE)
    assert error(out[::2], expected[::2]) <= 1e-6
    assert error(out[1::2], expected[1::2]) > 1e-2


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_score_is_loud_from_its_entry_into_the_pool_and_elsewhere_silent(bad, gating):
    query, key, value, scores, _, _ = make_inputs(CASE)
    arrays = (query, key, value, scores.at[0, 3, 0].set(bad).at[1, 50, 1].set(bad))
    expected = whole(arrays, CASE, gating)
    assert np.isnan(expected).any()
    cache = make_cache(CASE, gating=gating)
    for _, out in (step_through(cache, *arrays), in_chunks(cache, arrays, [19] * 5)):
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
        np.testing.assert_allclose(out, expected, atol=2e-6)


def test_a_donated_cache_keeps_its_size_and_its_program():
    *arrays, _, _ = make_inputs(CASE)
    step = jax.jit(extend_cache, donate_argnums=0)
    cache = make_cache(CASE)
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    for t in range(3 * (CASE.k + CASE.window)):
        previous = cache
        cache, _ = step(cache, *(x[:, t : t + 1] for x in arrays))
        assert all(x.is_deleted() for x in jax.tree.leaves(previous))
        assert sum(x.nbytes for x in jax.tree.leaves(cache)) == size
    assert step._cache_size() == 1
    rows = CASE.kv_heads * (CASE.k + CASE.window)
    scalars = CASE.kv_heads * (4 * CASE.k + 3)
    assert size == 4 * 4 * (rows * (2 * CASE.head_dim + 2) + scalars + 1)


def test_straight_through_and_shared_scores_remember_less():
    assert make_cache(CASE, gating="straight_through").support is None
    shared = make_cache(CASE, shared_scores=True, support_size=5)
    assert shared.score.shape == (4, 1, 13)
    assert shared.support.score.shape == (4, 1, 5)


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"num_selected": 0}, ValueError, "num_selected=0 must be at least 1"),
        ({"head_dim": 1.5}, TypeError, "head_dim must be an int, got 1.5"),
        ({"sliding_window": -1}, ValueError, "sliding_window=-1 must be at least 0"),
        ({"support_size": 0}, ValueError, "support_size=0 must be at least 1"),
        ({"gating": "hard"}, ValueError, "gating='hard' is unknown"),
        ({"dtype": jnp.int32}, TypeError, "must be a floating-point dtype"),
        ({"dtype": "foo"}, TypeError, "dtype='foo' must be a floating-point dtype"),
        (
            {"gating": "straight_through", "support_size": 3},
            ValueError,
            "support_size=3 is of no use with gating='straight_through'",
        ),
    ],
)
def test_bad_sizes_are_named(changes, exception, message):
    with pytest.raises(exception, match=message):
        make_cache(CASE, **changes)


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"key": (4, 2, 2, 8), "value": (4, 2, 2, 8)}, ValueError, "value has shape|key has shape"),
        ({"scores": (4, 2, 1)}, ValueError, r"scores has shape \(4, 2, 1\), expected \(4, 2, 2\)"),
        ({"num_tokens": jnp.ones(3, int)}, ValueError, r"num_tokens has shape \(3,\), expected"),
        ({"num_tokens": jnp.full(4, 3)}, ValueError, "num_tokens holds 3, expected 0 to C = 2"),
        ({"num_tokens": jnp.ones(4)}, TypeError, "num_tokens must be an integer array"),
        ({"num_tokens": 1}, TypeError, "num_tokens must be an integer array, got 1"),
        ({"num_tokens": [1] * 4}, TypeError, r"num_tokens must be an integer array, got \[1, 1"),
        ({"scale": "a"}, ValueError, "scale='a' must be a finite float or None"),
    ],
)
def test_bad_tokens_are_named(changes, exception, message):
    shapes = {"query": (4, 2, 4, 16), "key": (4, 2, 2, 16), "value": (4, 2, 2, 16)}
    arguments = shapes | {"scores": (4, 2, 2)} | changes
    arguments = {n: jnp.zeros(x) if isinstance(x, tuple) else x for n, x in arguments.items()}
    with pytest.raises(exception, match=message):
        extend_cache(make_cache(CASE), **arguments)


@pytest.mark.parametrize("size", [1, 2])
def test_bad_arguments_are_named_for_one_token_too(size):
    tokens = [jnp.zeros((4, size, *x)) for x in ((4, 16), (2, 16), (2, 16), (2,))]
    with pytest.raises(ValueError, match="implementation='foo' is unknown"):
        extend_cache(make_cache(CASE), *tokens, implementation="foo")
    with pytest.raises(NotImplementedError, match="'mosaic_tpu' has no kernel"):
        extend_cache(make_cache(CASE), *tokens, implementation="mosaic_tpu")
    with pytest.raises(TypeError, match="scores must be a floating-point array, got dtype int32"):
        extend_cache(make_cache(CASE), *tokens[:3], tokens[3].astype(int))


def test_an_implementation_is_without_effect_for_one_token():
    tokens = [jnp.ones((4, 1, *x)) for x in ((4, 16), (2, 16), (2, 16), (2,))]
    expected = extend_cache(make_cache(CASE), *tokens)
    actual = extend_cache(make_cache(CASE), *tokens, implementation="mosaic_gpu")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_of_none(size):
    cache = make_cache(CASE, batch=0)
    tokens = [jnp.zeros((0, size, *x)) for x in ((4, 16), (2, 16), (2, 16), (2,))]
    extended, out, dropped = extend_cache(cache, *tokens, return_dropped=True)
    assert jax.tree.map(jnp.shape, extended) == jax.tree.map(jnp.shape, cache)
    assert out.shape == tokens[0].shape
    assert (dropped.key.shape, dropped.exists.shape) == (tokens[1].shape, tokens[3].shape)
    gradient = jax.grad(lambda query: extend_cache(cache, query, *tokens[1:])[1].sum())(tokens[0])
    assert gradient.shape == tokens[0].shape


def test_a_cache_of_another_size_or_dtype_is_refused():
    tokens = [jnp.zeros(x) for x in ((4, 2, 4, 16), (4, 2, 2, 16), (4, 2, 2, 16), (4, 2, 2))]
    with pytest.raises(
        ValueError, match=r"key has shape \(4, 2, 2, 16\), expected \(3, 2, 2, 16\)"
    ):
        extend_cache(make_cache(CASE, batch=3), *tokens)
    with pytest.raises(TypeError, match="key has dtype float32, expected the cache's bfloat16"):
        extend_cache(make_cache(CASE, dtype=jnp.bfloat16), *tokens)
    with pytest.raises(ValueError, match="holds no token"):
        extend_cache(make_cache(CASE), *(x[:, :0] for x in tokens))
    with pytest.raises(TypeError, match="rows must be a bool array"):
        reset_cache(make_cache(CASE), jnp.ones(4))
    with pytest.raises(ValueError, match=r"rows has shape \(3,\), expected \[B\] = \(4,\)"):
        reset_cache(make_cache(CASE), jnp.ones(3, bool))


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from sparsek_jax import extend_cache
from tests.ops.test_cache import CASE, make_cache, make_inputs

mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
*arrays, _, _ = make_inputs(CASE)
cache = make_cache(CASE)


def put(x, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(*axes[: x.ndim])))


sharded = jax.tree.map(lambda x: put(x, "data", "tensor"), cache)
extend = jax.jit(extend_cache, static_argnames="implementation")
# Warm up, then one token at a time.
for start, end in ((0, 30), (30, 31), (31, 32)):
    tokens = [x[:, start:end] for x in arrays]
    split = [put(x, "data", None, "tensor") for x in tokens]
    cache, expected = extend(cache, *tokens, implementation="reference")
    compiled = extend.lower(sharded, *split, implementation="reference").compile()
    sharded, out = compiled(sharded, *split)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert out.sharding.spec == P("data", None, "tensor"), out.sharding
text = compiled.as_text()
for name in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
    assert name not in text, name
print("equal on", len(jax.devices()), "devices")
"""


def test_sharded_over_batch_and_heads_without_communication():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "equal on 4 devices" in result.stdout
