import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.generation.explain.memory import QUANTILES, explain
from sparsek_jax.nn import AttentionConfig, Decoder, DecoderConfig
from tests.ops import oracle

# More than there are moments.
LENGTH = 140
HYBRID = {"num_layers": 2, "pattern": ("dense", "sparsek")}


def decoder(num_layers=1, scan_layers=False, **attention):
    defaults = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    defaults |= {"num_selected": 5, "sliding_window": 4}
    config = DecoderConfig(
        vocab_size=258,
        num_layers=num_layers,
        d_model=16,
        mlp_dim=16,
        scan_layers=scan_layers,
        attention=AttentionConfig(**defaults | attention),
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    model.embedding[...] = 50 * model.embedding[...]
    return model


def tokens():
    return np.random.default_rng(1).integers(0, 258, LENGTH).astype(np.int32)


def check_head(memory, layer, head):
    """Compares one head with selections made query by query from its scores."""
    k, window, length = memory.num_selected, memory.sliding_window, memory.length
    scores = memory.score[layer, head].astype(np.float64)
    attended = np.zeros((length, length), bool)
    displaced, rejected = np.zeros((2, length), bool)
    previous, slots, ages = set(), {}, {}
    for t in range(length):
        pool = oracle.pool(t, 0, window)
        chosen = set(oracle.selected(scores, pool, k).tolist())
        attended[t, max(0, t - window + 1) : t + 1] = True
        attended[t, list(chosen)] = True
        if len(pool):
            ages[t] = np.quantile([t - j for j in chosen], QUANTILES)
        displaced[t] = bool(previous - chosen)
        rejected[t] = bool(len(pool)) and pool[-1] not in chosen
        for j in chosen:
            slots.setdefault((t, int(memory.slot[layer, head, j])), []).append(j)
        previous = chosen
    np.testing.assert_array_equal(memory.survival[layer, head], attended.sum(0))
    np.testing.assert_array_equal(memory.held[layer, head], attended[-1])
    np.testing.assert_array_equal(memory.displaced[layer, head], displaced)
    np.testing.assert_array_equal(memory.rejected[layer, head], rejected)
    moments = memory.moments.tolist()
    assert len(moments) == min(len(ages), 128)
    assert (moments[0], moments[-1]) == (min(ages), max(ages))
    assert max(np.diff(moments, append=length)) <= 2
    for row, t in enumerate(memory.moments):
        np.testing.assert_allclose(memory.ages[layer, head, row], ages[t])
    # No two keys share a slot at a time.
    assert all(len(keys) == 1 and 0 <= slot < k for (_, slot), keys in slots.items())


@pytest.mark.parametrize(
    ("settings", "layers", "heads"),
    [
        ({}, (0,), 2),
        ({"sliding_window": 0, "shared_scores": True}, (0,), 1),
        ({"sliding_window": LENGTH - 3}, (0,), 2),
        (HYBRID, (1,), 2),
        ({"num_layers": 2, "scan_layers": True, "kind": "sparsek_linear"}, (0, 1), 2),
    ],
)
def test_equals_selections_made_query_by_query(settings, layers, heads):
    model = decoder(**settings)
    memory = explain(model, tokens())
    assert memory.layers == layers
    assert memory.until.shape == (len(layers), heads, LENGTH)
    assert memory.shared_scores == (heads == 1)
    for index in range(len(layers)):
        for head in range(heads):
            check_head(memory, index, head)


def test_scores_are_those_of_the_model():
    model = decoder(**HYBRID)
    memory = explain(model, tokens())
    scores_of = jax.jit(lambda tokens: model.hidden(tokens, return_scores=True)[1])
    (scores,) = scores_of(tokens()[None]).values()
    np.testing.assert_allclose(memory.score, scores.swapaxes(1, 2), rtol=1e-5, atol=1e-5)


def test_held_is_what_the_cache_of_generation_holds():
    model = decoder()
    memory = explain(model, tokens())
    extend = jax.jit(lambda tokens, cache: model.extend(tokens, cache)[0])
    cache = model.init_cache(1)
    for chunk in tokens().reshape(-1, 1, 35):
        cache = extend(chunk, cache)
    (positions,) = cache.layers[0].sparsek.position
    for head in range(2):
        assert sorted(positions[head].tolist()) == np.flatnonzero(memory.held[0, head]).tolist()


def test_one_token():
    memory = explain(decoder(), [7])
    assert memory.survival.tolist() == [[[1], [1]]]
    assert memory.held.all()


@pytest.mark.parametrize("pattern", [("dense",), ("dense", "window")])
def test_a_model_that_selects_nothing_is_refused(pattern):
    with pytest.raises(ValueError, match="no SparseK layer, only dense"):
        explain(decoder(num_layers=2, pattern=pattern), tokens())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        explain(decoder(), [])
    model = decoder()
    model.embedding[...] = model.embedding[...] * jnp.nan
    with pytest.raises(ValueError, match="layer 0 are not finite"):
        explain(model, tokens())
