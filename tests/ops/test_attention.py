"""One suite for every implementation: outputs and all gradients against the float64 oracle."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax import sparsek_attention
from tests.ops import oracle

IMPLEMENTATIONS = ["reference", "xla"]
NAMES = ("out", "dquery", "dkey", "dvalue", "dscores")
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}


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


@functools.cache
def run_oracle(case, gating, dtype):
    *arrays, d_out, segment_ids = make_inputs(case, dtype)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
        attend = functools.partial(
            oracle.attention, k=case.k, window=case.window, gating=gating, segment_ids=segment_ids
        )
        out, vjp = jax.vjp(attend, *arrays)
        return [np.asarray(x) for x in (out, *vjp(jnp.asarray(np.asarray(d_out), jnp.float64)))]


@pytest.mark.parametrize("gating", ["soft", "straight_through"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, gating):
    for dtype in ("float32", "bfloat16"):
        inputs = make_inputs(case, dtype)
        expected = run_oracle(case, gating, dtype)
        for implementation in IMPLEMENTATIONS:
            actual = run(*inputs, case=case, gating=gating, implementation=implementation)
            assert [x.dtype for x in actual] == [dtype] * 4 + ["float32"]
            found = errors(actual, expected)
            assert max(found.values()) <= TOLERANCE[dtype], (implementation, dtype, found)
