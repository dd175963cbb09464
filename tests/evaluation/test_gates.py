import jax
import numpy as np
import pytest

from sparsek_jax.evaluation.gates import MEANINGS, GateTally, gate_sums
from sparsek_jax.nn import AttentionConfig

measure_batch = jax.jit(gate_sums, static_argnames="config")


def attention(**fields):
    defaults = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "slope": 0.0}
    return AttentionConfig(**defaults | fields)


def measure(scores, valid, config, segment_ids=None):
    tally = GateTally(config)
    sums = measure_batch(scores, valid, config=config, segment_ids=segment_ids)
    tally.add({3: jax.device_get(sums)})
    (layer,) = tally.result()
    assert layer.layer == 3
    return layer


def oracle(scores, valid, config, segment_ids):
    """Every query by itself, float64: rows (kept, support, saturated) by head."""
    k = config.num_selected
    batch, _, heads = scores.shape
    rows = [[] for _ in range(heads)]
    for b in range(batch):
        for t in np.flatnonzero(valid[b]):
            start = t
            while start and segment_ids[b, start - 1] == segment_ids[b, t]:
                start -= 1
            stop = t - config.sliding_window + 1
            if stop - start <= k:
                continue
            for head in range(heads):
                pool = np.sort(scores[b, start:stop, head].astype(np.float64))[::-1]
                low, high = pool[-1] - 1, pool[0]
                for _ in range(200):
                    middle = (low + high) / 2
                    if np.clip(pool - middle, 0, 1).sum() > k:
                        low = middle
                    else:
                        high = middle
                gates = np.clip(pool - high, 0, 1)
                rows[head].append(
                    (gates[:k].sum() / k, (gates > 1e-9).sum(), (gates > 1 - 1e-9).sum())
                )
    return [np.array(r) for r in rows]


def documents(length):
    """Packed rows with padding at the end of the second."""
    segment_ids = np.ones((2, length), np.int32)
    segment_ids[0, length // 3 :] = 2
    segment_ids[1, length - 9 :] = 0
    return segment_ids


@pytest.mark.parametrize("spread", [0.05, 1.0, 30.0])
@pytest.mark.parametrize(("k", "window"), [(1, 5), (6, 0), (6, 5)])
def test_equals_a_query_by_query_oracle(window, spread, k):
    length = 80
    scores = spread * np.random.default_rng(0).standard_normal((2, length, 2)).astype(np.float32)
    segment_ids = documents(length)
    valid = segment_ids > 0
    config = attention(num_selected=k, sliding_window=window)
    layer = measure(scores, valid, config, segment_ids)
    expected = oracle(scores, valid, config, segment_ids)
    assert layer.queries == len(expected[0])
    for head, rows in enumerate(expected):
        kept, support, saturated = rows.mean(0)
        np.testing.assert_allclose(layer.kept_mass[head], kept, rtol=1e-4)
        np.testing.assert_allclose(layer.support[head], support, rtol=2e-3)
        np.testing.assert_allclose(layer.saturation[head], saturated / k, atol=2e-3)
        share = 1 - rows[:, 2].sum() / rows[:, 1].sum()
        np.testing.assert_allclose(layer.interior[head], share, atol=2e-3)


@pytest.mark.parametrize("num_sinks", [0, 3])
def test_spread_is_taken_within_documents_and_without_slope_and_sinks(num_sinks):
    length, slopes = 60, np.array([0.25, -2.0])
    rng = np.random.default_rng(0)
    content = rng.standard_normal((2, length, 2)).astype(np.float32)
    content[..., 1] *= 3
    segment_ids = documents(length)
    valid = segment_ids > 0
    scores, parts = content.copy(), []
    for b in range(2):
        for segment in np.unique(segment_ids[b][valid[b]]):
            where = segment_ids[b] == segment
            place = np.arange(where.sum())[:, None]
            scores[b, where] += 100 * segment + slopes * place
            scores[b, np.flatnonzero(where)[:num_sinks]] = 500
            scored = (place[num_sinks:], content[b, where][num_sinks:])
            parts.append([x - x.mean(0) for x in scored])
    place, content = map(np.concatenate, zip(*parts, strict=True))
    residual = content - place * (place * content).sum(0) / (place**2).sum()
    config = attention(num_selected=4, num_sinks=num_sinks)
    layer = measure(scores, valid, config, segment_ids)
    np.testing.assert_allclose(layer.score_std, np.sqrt(np.mean(residual**2, 0)), rtol=1e-3)


def test_padding_behind_a_continuous_row_does_not_count():
    length, padding = 60, 7
    scores = np.random.default_rng(0).standard_normal((1, length, 2)).astype(np.float32)
    valid = np.arange(length)[None] < length - padding
    scores[~valid] += 100
    config = attention(num_selected=4)
    layer = measure(scores, valid, config)
    alone = measure(scores[:, :-padding], valid[:, :-padding], config)
    assert layer.queries == alone.queries
    for name in ("kept_mass", "support", "saturation", "interior", "score_std"):
        np.testing.assert_allclose(getattr(layer, name), getattr(alone, name), rtol=1e-5)


def test_batches_add_up():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((4, 50, 2)).astype(np.float32)
    valid = np.ones((4, 50), bool)
    config = attention(num_selected=4, sliding_window=3)
    whole = measure(scores, valid, config)
    tally = GateTally(config)
    for rows in (slice(0, 2), slice(2, 4)):
        tally.add({3: jax.device_get(measure_batch(scores[rows], valid[rows], config=config))})
    (parts,) = tally.result()
    assert parts.queries == whole.queries
    for name in ("kept_mass", "support", "saturation", "interior", "score_std"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5)


def test_memory_is_linear_in_the_row():
    config = attention(num_selected=64, sliding_window=16)

    def temporary_bytes(length):
        lowered = measure_batch.lower(
            jax.ShapeDtypeStruct((1, length, 2), np.float32),
            jax.ShapeDtypeStruct((1, length), bool),
            config=config,
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048) < 6 * temporary_bytes(512)


@pytest.mark.parametrize(
    ("verdict", "make"),
    [
        ("alive", lambda rng: rng.standard_normal((1, 200, 1))),
        ("constant", lambda rng: np.full((1, 200, 1), 0.7)),
        ("constant", lambda rng: 1e-5 * rng.standard_normal((1, 200, 1))),
        ("diffuse", lambda rng: 0.05 * rng.standard_normal((1, 200, 1))),
        ("saturated", lambda rng: 10.0 * rng.permutation(200).reshape(1, 200, 1)),
        ("broken", lambda rng: np.where(np.arange(200) == 50, np.nan, 1.0)[None, :, None]),
    ],
)
def test_verdict(verdict, make):
    scores = make(np.random.default_rng(0)).astype(np.float32)
    layer = measure(scores, np.ones((1, 200), bool), attention(num_selected=8, sliding_window=4))
    assert layer.verdicts == (verdict,)
    assert verdict in MEANINGS


def test_no_verdict_where_no_pool_exceeds_k():
    scores = np.random.default_rng(0).standard_normal((1, 20, 1)).astype(np.float32)
    layer = measure(scores, np.ones((1, 20), bool), attention(num_selected=20))
    assert layer.queries == 0
    assert layer.verdicts == ("unused",)
