"""One suite for every implementation: outputs and all gradients against the float64 oracle."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax import causal_selection, sparsek_attention
from sparsek_jax.ops.gating import GATINGS
from tests.ops import oracle

KERNELS = pytest.param("mosaic_gpu", marks=pytest.mark.gpu)
IMPLEMENTATIONS = ["reference", "xla", KERNELS]
# What bfloat16 rounds differs between kinds of gating only in the kernels.
GATINGS_IN = {"float32": GATINGS, "bfloat16": ("soft", "straight_through")}
GRID = [
    (gating, name, dtype)
    for name in ("reference", "xla")
    for dtype, gatings in GATINGS_IN.items()
    for gating in gatings
]
GRID += [
    pytest.param(gating, "mosaic_gpu", dtype, marks=pytest.mark.gpu)
    for gating in GATINGS
    for dtype in ("bfloat16", "float16")
]
NAMES = ("out", "dquery", "dkey", "dvalue", "dscores")
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}


def dtype_of(implementation):
    """What an implementation is checked in where one dtype will do."""
    return "bfloat16" if implementation == "mosaic_gpu" else "float32"


def assert_same_output(out, expected):
    """Equal up to the rounding of the output's dtype, the expected one given in float32."""
    if out.dtype == jnp.float32:
        np.testing.assert_allclose(out, expected, atol=2e-6)
    else:
        error = np.linalg.norm(out.astype(jnp.float32) - expected)
        assert error <= TOLERANCE[str(out.dtype)] * np.linalg.norm(expected)


class Case(NamedTuple):
    kv_heads: int
    group: int
    head_dim: int
    length: int
    k: int
    window: int
    shared: bool = False


CASES = [
    Case(2, 1, 64, 63, 8, 0),
    Case(1, 2, 80, 75, 9, 5),
    Case(2, 3, 96, 71, 16, 7),
    Case(2, 4, 128, 131, 20, 16),
    Case(1, 7, 32, 129, 33, 1),
    Case(2, 8, 60, 65, 5, 64, shared=True),
    Case(1, 16, 64, 64, 1, 3),
    # T <= k, T < w, k + w = T, one token.
    Case(1, 2, 32, 31, 40, 4),
    Case(2, 2, 32, 33, 4, 50),
    Case(2, 1, 32, 40, 30, 10),
    Case(1, 3, 32, 1, 2, 0),
]
# Several chunks, lists and blocks of the kernels.
LONG_CASES = [
    Case(2, 1, 64, 1500, 200, 100),
    Case(1, 3, 128, 1033, 130, 0),
    Case(2, 2, 80, 900, 64, 300, shared=True),
]


def make_inputs(case, dtype=np.float32, seed=0):
    """Four rows: gaussian, packed, ties in packed documents, one key that everybody selects."""
    rng = np.random.default_rng(seed)
    batch, length, heads = 4, case.length, case.kv_heads
    query = rng.normal(size=(batch, length, heads * case.group, case.head_dim))
    key, value = rng.normal(size=(2, batch, length, heads, case.head_dim))
    scores = rng.normal(size=(batch, length, 1 if case.shared else heads))
    scores[2] = np.round(scores[2] * 2) / 2
    scores[3, 0] = 5.0
    d_out = rng.normal(size=query.shape)
    segment_ids = np.ones((batch, length), np.int32)
    segment_ids[1] = np.sort(rng.integers(1, 4, length))
    segment_ids[2, : length // 3] = 7
    arrays = [jnp.asarray(x, dtype) for x in (query, key, value, d_out)]
    return *arrays[:3], jnp.asarray(scores, jnp.float32), arrays[3], jnp.asarray(segment_ids)


def errors(actual, expected):
    """Relative error in norm of each array, in float64."""
    result = {}
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # An all-zero gradient must be zero up to the noise of its terms, which are of order one.
        result[name] = np.linalg.norm(x - y) / (np.linalg.norm(y) or 1.0)
    return result


@functools.partial(jax.jit, static_argnames=("case", "gating", "implementation"))
def run(query, key, value, scores, d_out, segment_ids, *, case, gating, implementation):
    def attend(*arrays):
        return sparsek_attention(
            *arrays,
            num_selected=case.k,
            sliding_window=case.window,
            gating=gating,
            segment_ids=segment_ids,
            implementation=implementation,
        )

    out, vjp = jax.vjp(attend, query, key, value, scores)
    return out, *vjp(d_out)


@functools.partial(jax.jit, static_argnames=("case", "gatings", "implementation"))
def run_each(*inputs, gatings, **settings):
    return {gating: run(*inputs, gating=gating, **settings) for gating in gatings}


def run_as_one(*inputs, gating, implementation, case):
    """`run`, of a program that all kinds of gating share.

    It holds their selection once, which takes longer to compile than the rest. Kernels are compiled
    by themselves.
    """
    if implementation == "mosaic_gpu":
        return run(*inputs, case=case, gating=gating, implementation=implementation)
    gatings = GATINGS_IN[str(inputs[0].dtype)]
    return run_each(*inputs, gatings=gatings, case=case, implementation=implementation)[gating]


@functools.cache
def run_oracle(case, gating, dtype):
    *arrays, d_out, segment_ids = make_inputs(case, dtype)
    with jax.enable_x64(True):
        *arrays, d_out = (jnp.asarray(np.asarray(x), jnp.float64) for x in (*arrays, d_out))
        attend = functools.partial(
            oracle.attention, k=case.k, window=case.window, gating=gating, segment_ids=segment_ids
        )
        out, vjp = jax.vjp(attend, *arrays)
        return [np.asarray(x) for x in (out, *vjp(d_out))]


@pytest.mark.parametrize(("gating", "implementation", "dtype"), GRID)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, gating, dtype, implementation):
    inputs = make_inputs(case, dtype)
    actual = run_as_one(*inputs, case=case, gating=gating, implementation=implementation)
    assert [x.dtype for x in actual] == [dtype] * 4 + ["float32"]
    found = errors(actual, run_oracle(case, gating, dtype))
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.gpu
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_outputs_and_gradients_of_long_rows(case, gating):
    test_outputs_and_gradients(case, gating, "bfloat16", "mosaic_gpu")


def test_oracle_gradients_against_finite_differences():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(x) for x in rng.normal(size=(3, 1, 9, 1, 2)))
        scores = jnp.asarray(rng.normal(size=(1, 9, 1)))

        def loss(*arrays):
            return jnp.sum(jnp.sin(oracle.attention(*arrays, k=3, window=2, gating="soft")))

        arrays = [query, key, value, scores]
        gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)
        for i, gradient in enumerate(gradients):
            direction = jnp.asarray(rng.normal(size=arrays[i].shape))

            def shifted(step, i=i, direction=direction):
                moved = list(arrays)
                moved[i] = moved[i] + step * direction
                return loss(*moved)

            numeric = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
            np.testing.assert_allclose(jnp.vdot(gradient, direction), numeric, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("k", "window"), [(1, 62), (63, 0), (40, 23), (100, 100)])
def test_equals_dense_causal_attention_when_nothing_is_dropped(k, window, implementation):
    dtype = dtype_of(implementation)
    query, key, value, scores, _, _ = make_inputs(Case(2, 2, 32, 63, k, window), dtype)
    out = sparsek_attention(
        query,
        key,
        value,
        scores,
        num_selected=k,
        sliding_window=window,
        implementation=implementation,
    )
    with jax.default_matmul_precision("highest"):
        arrays = (x.astype(jnp.float32) for x in (query, key, value))
        dense = jax.nn.dot_product_attention(*arrays, is_causal=True)
    assert_same_output(out, dense)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [37, 50, 64, 65, 100, 150])
def test_scores_computed_in_the_same_jit(length, packed, implementation):
    """The compiler may fuse what makes the scores into every place that reads them."""
    case = Case(2, 1, 16, length, 6, 5)
    dtype = dtype_of(implementation)
    query, key, value, x, d_out, segment_ids = make_inputs(case, dtype)
    segment_ids = segment_ids if packed else None

    @jax.jit
    def together(query, key, value, x):
        def attend(query, key, value, x):
            scores = 1.3 * x + 1e-6 * jnp.arange(length, dtype=jnp.float32)[:, None]
            out = sparsek_attention(
                query,
                key,
                value,
                scores,
                num_selected=case.k,
                sliding_window=case.window,
                segment_ids=segment_ids,
                implementation=implementation,
            )
            return out, scores

        out, vjp, scores = jax.vjp(attend, query, key, value, x, has_aux=True)
        return (out, *vjp(d_out)), scores

    (*actual, d_x), scores = together(query, key, value, x)
    query, key, value, d_out = (x.astype(jnp.float32) for x in (query, key, value, d_out))
    ids = jnp.ones((4, length), jnp.int32) if segment_ids is None else segment_ids
    inputs = (query, key, value, scores, d_out, ids)
    # Compiled once for all implementations, packed or not.
    expected = run(*inputs, case=case, gating="soft", implementation="reference")
    found = errors([*actual, d_x / 1.3], expected)
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_documents_do_not_feel_each_other_s_cotangents(implementation):
    case = Case(1, 2, 32, 80, 6, 0)
    query, key, value, scores, d_out, _ = make_inputs(case, dtype_of(implementation))
    segment_ids = jnp.repeat(jnp.arange(2), 40)[None].repeat(4, axis=0)

    def gradients(d_out):
        inputs = (query, key, value, scores, d_out, segment_ids)
        return run(*inputs, case=case, gating="soft", implementation=implementation)[1:]

    clean = gradients(d_out)
    for x, y in zip(gradients(d_out.at[:, 30].multiply(1e8)), clean, strict=True):
        np.testing.assert_allclose(x[:, 40:], y[:, 40:], rtol=1e-5, atol=1e-6)
    d_scores = gradients(d_out.at[:, 30].set(jnp.nan))[3]
    np.testing.assert_allclose(d_scores[:, 40:], clean[3][:, 40:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case",
    [CASES[0], CASES[3], Case(2, 2, 32, 70, 6, 5, shared=True), CASES[7], LONG_CASES[2]],
    ids=str,
)
def test_tells_which_query_drops_each_key(case, implementation):
    *arrays, _, segment_ids = make_inputs(case, dtype_of(implementation))
    settings = {
        "num_selected": case.k,
        "sliding_window": case.window,
        "segment_ids": segment_ids,
    }
    attend = functools.partial(sparsek_attention, **settings, implementation=implementation)
    # As one program, which is compiled faster than two.
    both = jax.jit(lambda *arrays: (attend(*arrays, return_until=True), attend(*arrays)))
    (out, until), alone = both(*arrays)
    np.testing.assert_array_equal(out, alone)
    selection = causal_selection(arrays[3], **settings)
    assert until.dtype == jnp.int32
    np.testing.assert_array_equal(until, selection.lifetimes.until)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_a_query_of_nothing(shape):
    batch, length, _, size = shape
    query, key = jnp.ones(shape), jnp.ones((batch, length, 2, size))
    scores = jnp.ones((batch, length, 2))
    out, until = sparsek_attention(
        query, key, key, scores, num_selected=1, sliding_window=1, return_until=True
    )
    assert out.shape == shape
    # Of equal scores the first one is kept.
    expected = jnp.array([3, 2, 3])[:length, None]
    np.testing.assert_array_equal(until, jnp.broadcast_to(expected, scores.shape))


@pytest.mark.parametrize("implementation", ["xla", KERNELS])
def test_vmap_jit_and_remat_agree_with_plain_calls(implementation):
    case = CASES[1]
    *arrays, d_out, segment_ids = make_inputs(case, dtype_of(implementation))

    def attend(query, key, value, scores, segment_ids):
        return sparsek_attention(
            query,
            key,
            value,
            scores,
            num_selected=case.k,
            sliding_window=case.window,
            segment_ids=segment_ids,
            implementation=implementation,
        )

    def value_and_gradients(function):
        def loss(*arrays):
            return jnp.vdot(function(*arrays, segment_ids), d_out)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arrays)

    plain = value_and_gradients(attend)
    one_row = jax.vmap(lambda *row: attend(*(x[None] for x in row))[0])
    policy = jax.checkpoint_policies.nothing_saveable
    for other in (one_row, jax.checkpoint(attend, policy=policy)):
        for x, y in zip(
            jax.tree.leaves(value_and_gradients(other)), jax.tree.leaves(plain), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", KERNELS])
def test_deterministic(implementation):
    inputs = make_inputs(CASES[3], dtype_of(implementation))
    first, second = (
        run(*inputs, case=CASES[3], gating="soft", implementation=implementation) for _ in range(2)
    )
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gating", GATINGS)
def test_nan_score_reaches_its_document_only(gating, implementation):
    case = Case(1, 2, 32, 40, 4, 3)
    query, key, value, scores, d_out, _ = make_inputs(case, dtype_of(implementation))
    # Three documents, so that one comes before and one after.
    segment_ids = jnp.array([0] * 20 + [1] * 15 + [2] * 5)[None].repeat(4, axis=0)
    settings = {"case": case, "gating": gating, "implementation": implementation}
    clean = run_as_one(query, key, value, scores, d_out, segment_ids, **settings)
    scores = scores.at[0, 25].set(jnp.nan)
    out, *gradients = run_as_one(query, key, value, scores, d_out, segment_ids, **settings)
    # The key enters the pool at 28, with four other keys or more.
    assert np.isnan(out[0, 28:35]).all()
    np.testing.assert_array_equal(out[0, :28], clean[0][0, :28])
    np.testing.assert_array_equal(out[0, 35:], clean[0][0, 35:])
    for x, expected in zip(gradients, clean[1:], strict=True):
        assert np.isnan(x[0, 20:35]).any()
        for others in (slice(0, 20), slice(35, 40)):
            np.testing.assert_allclose(x[0, others], expected[0, others], atol=1e-6)
    np.testing.assert_allclose(out[1:], clean[0][1:], atol=1e-6)
    assert all(np.isfinite(x[1:]).all() for x in gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("window", [0, 4])
def test_gates_that_round_to_zero_leave_all_finite(window, gating, implementation):
    """Near-equal scores with a large offset, and one key whose logit outweighs all others."""
    # So long that there may be pruning, in two rooms.
    case = Case(1, 2, 32, 64, 1, window)
    dtype = dtype_of(implementation)
    query, key = (jnp.ones((1, 64, heads, 32), dtype) for heads in (2, 1))
    key = (0 * key).at[0, 0].set(20.0)
    scores = jnp.full((1, 64, 1), 2.0**20)
    ids = jnp.zeros((1, 64), jnp.int32)
    settings = {"case": case, "gating": gating, "implementation": implementation}
    out, *gradients = run_as_one(query, key, 1 + 0 * key, scores, query, ids, **settings)
    assert np.isfinite(out).all()
    assert all(np.isfinite(x).all() for x in gradients)
    if gating in ("straight_through", "soft_weights"):
        # Weights sum to one, and so do values of one.
        np.testing.assert_allclose(out, 1.0, rtol=1e-2 if dtype == "bfloat16" else 1e-6)


def test_memory_is_linear_in_length():
    def temporary_bytes(length):
        query = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        scores = jax.ShapeDtypeStruct((1, length, 2), jnp.float32)

        def gradients(query, key, value, scores):
            def loss(*arrays):
                out = sparsek_attention(
                    *arrays, num_selected=64, sliding_window=64, implementation="xla"
                )
                return jnp.sum(out**2)

            return jax.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, scores)

        compiled = jax.jit(gradients).lower(query, query, query, scores).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) <= 4.2 * temporary_bytes(1024)


@pytest.mark.parametrize(
    ("implementation", "platform"), [("xla", "cuda"), ("xla", "tpu"), ("mosaic_gpu", "cuda")]
)
def test_exports_to_other_platforms_from_here(implementation, platform):
    inputs = make_inputs(CASES[1], "bfloat16")
    attend = jax.jit(
        lambda *arrays: run(*arrays, case=CASES[1], gating="soft", implementation=implementation)
    )
    assert jax.export.export(attend, platforms=[platform])(*inputs).platforms == (platform,)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_beyond_int32_select_and_see_everything(implementation):
    case = Case(1, 2, 32, 20, 1, 0)
    query, key, value, scores, _, _ = make_inputs(case, dtype_of(implementation))
    attend = functools.partial(
        sparsek_attention, query, key, value, scores, implementation=implementation
    )
    expected = attend(num_selected=20, sliding_window=0)
    for k, window in ((2**40, 0), (2, 2**40)):
        out = attend(num_selected=k, sliding_window=window)
        assert_same_output(out, expected.astype(jnp.float32))


def attention_arguments(**change):
    shape = (2, 3, 2, 4)
    arguments = {
        "query": jnp.ones((2, 3, 4, 4)),
        "key": jnp.ones(shape),
        "value": jnp.ones(shape),
        "scores": jnp.ones((2, 3, 2)),
        "num_selected": 1,
    }
    return arguments | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": jnp.ones((2, 3, 4))}, ValueError, r"query must have shape"),
        ({"query": jnp.ones((2, 3, 3, 4))}, ValueError, "query has 3 heads, expected a multiple"),
        ({"value": jnp.ones((2, 3, 2, 5))}, ValueError, r"value has shape .* expected"),
        ({"value": jnp.ones((2, 3, 2, 4), "bfloat16")}, TypeError, "value has dtype bfloat16"),
        ({"query": jnp.ones((2, 3, 4, 4), int)}, TypeError, "query must be a floating-point"),
        ({"scores": jnp.ones((2, 3, 4))}, ValueError, "scores has shape"),
        ({"num_selected": 0}, ValueError, "num_selected=0"),
        ({"sliding_window": -1}, ValueError, "sliding_window=-1"),
        ({"gating": "hard"}, ValueError, "gating='hard' is unknown"),
        ({"scale": float("nan")}, ValueError, "scale=nan"),
        ({"scale": "a"}, ValueError, "scale='a' must be a finite float or None"),
        ({"scale": True}, ValueError, "scale=True must be a finite float or None"),
        ({"scale": [1.0]}, ValueError, r"scale=\[1.0\] must be a finite float or None"),
        ({"scale": 10**400}, ValueError, "scale=10+ must be a finite float or None"),
        ({"query": [[[[1.0]]]]}, TypeError, r"query must be a floating-point array, got \[\["),
        ({"key": [[[[1.0]]]]}, TypeError, r"key must be a floating-point array, got \[\["),
        ({"value": 1.0}, TypeError, "value must be a floating-point array, got 1.0"),
        ({"scores": [[[1.0]]]}, TypeError, r"scores must be a floating-point array, got \[\["),
        ({"segment_ids": [[1] * 3] * 2}, TypeError, r"segment_ids must be an integer array, got"),
        ({"segment_ids": jnp.ones((2, 4), int)}, ValueError, "segment_ids must have shape"),
        ({"segment_ids": np.full((2, 3), 2**31)}, ValueError, "segment_ids holds 2147483648"),
        ({"implementation": "cudnn"}, ValueError, "implementation='cudnn' is unknown"),
        ({"implementation": ["xla"]}, ValueError, r"implementation=\['xla'\] is unknown"),
        ({"implementation": "mosaic_tpu"}, NotImplementedError, "'mosaic_tpu' has no kernel"),
        ({"implementation": "mosaic_gpu"}, NotImplementedError, "'mosaic_gpu': query has dtype"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        sparsek_attention(**attention_arguments(**change))


def test_a_scale_is_known_while_tracing():
    attend = jax.jit(lambda scale: sparsek_attention(**attention_arguments(scale=scale)))
    with pytest.raises(ValueError, match=r"scale=.*Tracer.* known while tracing"):
        attend(1.0)


@pytest.mark.parametrize("scale", [2, np.float32(2), np.array(2.0), jnp.array(2.0)])
def test_a_scale_is_any_number(scale):
    out = sparsek_attention(**attention_arguments(scale=scale))
    np.testing.assert_array_equal(out, sparsek_attention(**attention_arguments(scale=2.0)))
