"""A decoder that generates against the same decoder over the whole text at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import AttentionConfig, Decoder, DecoderConfig, ScoringNetwork
from sparsek_jax.nn.norms import TimestepNorm

ATTENTION = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_selected=6,
    sliding_window=5,
    implementation="reference",
)
CONFIG = DecoderConfig(vocab_size=31, num_layers=2, d_model=32, mlp_dim=48, attention=ATTENTION)
LENGTH = 150
TOKENS = jax.random.randint(jax.random.key(0), (3, LENGTH), 0, 31)
VARIANTS = {
    "soft": {},
    "straight_through": {"gating": "straight_through"},
    "no window": {"sliding_window": 0},
    "shared scores": {"shared_scores": True},
    "kept sinks": {"num_sinks": 2, "learned_slope": True},
    "window": {"kind": "window"},
    "dense": {"kind": "dense", "qk_norm": True},
    "mixed": {"pattern": ("window", "sparsek")},
    "xla": {"implementation": "xla"},
    "unlearned": {"pattern": ("sinks", "random", "key_norm", "strided"), "num_sinks": 2},
    "gated linear": {"kind": "gated_linear"},
    "sparsek linear": {"kind": "sparsek_linear", "num_sinks": 2, "learned_slope": True},
    "sparsek linear without window": {
        "kind": "sparsek_linear",
        "sliding_window": 0,
        "shared_scores": True,
        "gating": "straight_through",
    },
    "hashing": {"kind": "lsh", "num_selected": 8},
    "blocks": {"pattern": ("bigbird", "moba", "nsa"), "sliding_window": 6, "block_size": 3},
}


@functools.cache
def make(variant="soft", seed=0, **changes):
    attention = dataclasses.replace(ATTENTION, **VARIANTS[variant])
    config = dataclasses.replace(CONFIG, attention=attention, **changes)
    return Decoder(config, rngs=nnx.Rngs(seed))


def empty_cache(model, max_length=LENGTH):
    soft = model.config.attention.gating == "soft"
    return model.init_cache(3, max_length=max_length, support_size=64 if soft else None)


def assert_nothing_lost(cache):
    np.testing.assert_array_equal(cache.num_lost, 0)


def test_what_was_lost_is_counted():
    model = make("soft")
    cache, _ = run_chunk(*nnx.split(model), model.init_cache(3, support_size=1), TOKENS[:, :60])
    by_layer = [layer.sparsek.support.num_lost for layer in cache.layers]
    assert np.min(by_layer) > 0
    np.testing.assert_array_equal(cache.num_lost, np.sum(by_layer, axis=(0, 2)))


def whole(model, tokens=TOKENS):
    return run_whole(*nnx.split(model), tokens)


@functools.partial(jax.jit, static_argnums=0)
def run_whole(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


@functools.partial(jax.jit, static_argnums=0)
def run_chunk(graphdef, state, cache, tokens, num_tokens=None):
    model = nnx.merge(graphdef, state)
    cache, hidden = model.extend(tokens, cache, num_tokens=num_tokens)
    return cache, model.logits(hidden)


@functools.partial(jax.jit, static_argnums=0)
def run_steps(graphdef, state, cache, tokens):
    model = nnx.merge(graphdef, state)

    def step(cache, token):
        cache, hidden = model.extend(token[:, None], cache)
        return cache, model.logits(hidden[:, 0])

    cache, logits = jax.lax.scan(step, cache, tokens.T)
    return cache, jnp.swapaxes(logits, 0, 1)


def extend(model, cache, tokens, sizes):
    """Appends chunks of these sizes, then single tokens."""
    split, outs, start = nnx.split(model), [], 0
    for size in sizes:
        cache, logits = run_chunk(*split, cache, tokens[:, start : start + size])
        outs.append(logits)
        start += size
    if start < tokens.shape[1]:
        cache, logits = run_steps(*split, cache, tokens[:, start:])
        outs.append(logits)
    return cache, jnp.concatenate(outs, axis=1)


def error(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


LONG_PROMPT, SHORT_PROMPT = [13, 13], [3]
PROMPTS = [(variant, LONG_PROMPT) for variant in VARIANTS if variant not in ("xla", "unlearned")]
PROMPTS += [("soft", SHORT_PROMPT), ("window", SHORT_PROMPT)]


@pytest.mark.parametrize(("variant", "sizes"), PROMPTS)
def test_a_prompt_and_then_ten_times_the_cache_match_the_whole(variant, sizes):
    model = make(variant, num_layers=len(VARIANTS[variant].get("pattern", "1")))
    # Where the prompt is short, as many steps follow, so that they are compiled once.
    length = LENGTH - sum(LONG_PROMPT) + sum(sizes)
    expected = whole(model)[:, :length]
    cache = empty_cache(model)
    extended, logits = extend(model, cache, TOKENS[:, :length], sizes)
    assert error(logits, expected) <= 1e-5
    assert_nothing_lost(extended)
    np.testing.assert_array_equal(extended.length, [length] * 3)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (cache, extended)]
    assert shapes[0] == shapes[1]


# "reference" rounds less to bfloat16 than single tokens do: two kinds of noise, of the same size.
@pytest.mark.parametrize(
    ("variant", "dtype", "tolerance"), [("soft", "float32", 1e-5), ("xla", "bfloat16", 5e-3)]
)
def test_seeds_and_dtypes(variant, dtype, tolerance):
    for seed in (1, 2, 3):
        model = make(variant, seed=seed, dtype=dtype, num_layers=1 if variant == "xla" else 2)
        tokens = jax.random.randint(jax.random.key(seed), TOKENS.shape, 0, 31)
        cache, logits = extend(model, empty_cache(model), tokens, [13, 13])
        assert_nothing_lost(cache)
        assert error(logits, whole(model, tokens)) <= tolerance
        assert cache.layers[0].sparsek.key.dtype == dtype


@pytest.mark.parametrize(
    ("variant", "num_layers"),
    [
        ("mixed", 2),
        ("mixed", 4),
        ("dense", 2),
        ("unlearned", 8),
        ("blocks", 6),
        ("hashing", 4),
        ("gated linear", 2),
        ("sparsek linear", 2),
    ],
)
def test_rows_of_different_lengths_and_reset(variant, num_layers):
    model = make(variant, num_layers=num_layers, scan_layers=num_layers > 2)
    split, expected = nnx.split(model), whole(model)
    counts = np.array([[13, 4, 0], [13, 0, 9], [1, 1, 0], [0, 1, 1], [2, 13, 13]])
    cache, outs = empty_cache(model, max_length=60), [[], [], []]
    for count, size in zip(counts, [13, 13, 1, 1, 13], strict=True):
        start = np.asarray(cache.length)
        tokens = jnp.stack([TOKENS[b, start[b] :][:size] for b in range(3)])
        # An id outside the vocabulary is a NaN.
        tokens = jnp.where(np.arange(size) < count[:, None], tokens, 31)
        cache, logits = run_chunk(*split, cache, tokens, jnp.asarray(count, jnp.uint8))
        for b in range(3):
            outs[b].append(logits[b, : count[b]])
    for b in range(3):
        assert error(jnp.concatenate(outs[b]), expected[b, : counts[:, b].sum()]) <= 1e-5

    reset = cache.reset(jnp.array([False, True, False]))
    np.testing.assert_array_equal(reset.length, [29, 0, 23])
    caches = (reset, cache, empty_cache(model, max_length=60))
    leaves = (map(np.asarray, jax.tree.leaves(x)) for x in caches)
    for x, y, z in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.delete(x, 1, axis=0), np.delete(y, 1, axis=0))
        np.testing.assert_array_equal(x[1], z[1])
    again = [jnp.roll(TOKENS[b], -int(reset.length[b]))[:13] for b in range(3)]
    # Counted as above, by the same program.
    _, logits = run_chunk(*split, reset, jnp.stack(again), jnp.full(3, 13, jnp.uint8))
    for b in range(3):
        assert error(logits[b], expected[b, reset.length[b] :][:13]) <= 1e-5


# Random selection differs between layers: all must know which they are.
@pytest.mark.parametrize(("variant", "num_layers"), [("mixed", 4), ("unlearned", 8)])
def test_unstacked_layers_are_those_of_the_stack(variant, num_layers):
    model = make(variant, num_layers=num_layers, scan_layers=True)
    unstacked = model.unstacked()
    assert not unstacked.config.scan_layers
    assert len(unstacked.layers) == num_layers
    assert error(whole(unstacked), whole(model)) <= 1e-5
    again = unstacked.unstacked()
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(again), nnx.state(unstacked)))


def test_one_program_and_a_constant_size_for_all_steps():
    model = make()
    graphdef, state = nnx.split(model)
    step = jax.jit(
        lambda state, cache, token: nnx.merge(graphdef, state).extend(token, cache),
        donate_argnums=1,
    )
    cache = model.init_cache(3)
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    for t in range(20):
        previous = cache
        cache, _ = step(state, cache, TOKENS[:, t : t + 1])
        assert all(x.is_deleted() for x in jax.tree.leaves(previous))
    assert step._cache_size() == 1
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == size


def test_dense_layers_without_room():
    model = make("dense")
    with pytest.raises(ValueError, match="max_length=None; expected an int"):
        model.init_cache(3)
    cache, _ = model.extend(TOKENS[:, :9], model.init_cache(3, max_length=10))
    with pytest.raises(ValueError, match=r"max_length=10 tokens .* expected at least 11"):
        model.extend(TOKENS[:, 9:11], cache)
    counts = jnp.array([1, 2, 1])
    _, logits = run_chunk(*nnx.split(model), cache, TOKENS[:, 9:11], counts)
    bad = np.isnan(logits).all(axis=-1)
    np.testing.assert_array_equal(bad[:, 0], False)
    assert bad[1, 1]


@pytest.mark.parametrize(
    ("tokens", "num_tokens", "exception", "message"),
    [
        (TOKENS[:2], None, ValueError, r"tokens has shape \(2, 150\); expected the cache's 3 rows"),
        (TOKENS[:, :0], None, ValueError, r"tokens has shape \(3, 0\); expected C of at least 1"),
        (TOKENS[0], None, ValueError, r"tokens has shape \(150,\); expected \[B, T\]"),
        (
            TOKENS[:, :2],
            jnp.array([0, 3, 1]),
            ValueError,
            "num_tokens holds 3, expected 0 to C = 2",
        ),
        (TOKENS[:, :2], jnp.ones(3), TypeError, "num_tokens must be an integer array"),
    ],
)
def test_bad_arguments_are_named(tokens, num_tokens, exception, message):
    model = make()
    with pytest.raises(exception, match=message):
        model.extend(tokens, model.init_cache(3), num_tokens=num_tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_none(variant):
    model = make(variant, num_layers=4)
    cache = model.init_cache(0, max_length=10)
    for size in (1, 3):
        extended, hidden = model.extend(TOKENS[:0, :size], cache)
        assert hidden.shape == (0, size, 32)
        assert jax.tree.map(jnp.shape, extended) == jax.tree.map(jnp.shape, cache)


def test_timestep_norm_in_chunks_keeps_its_digits_over_a_long_row():
    x = 100 + jax.random.normal(jax.random.key(0), (2, 8192, 3))
    norm = TimestepNorm(3)
    norm.gain[...] = jnp.array([1.0, 2.0, -0.5])
    expected = jax.jit(norm)(x, jnp.zeros((2, 8192), jnp.int32))

    @jax.jit
    def run(x):
        def chunk(state, x):
            return norm.extend(x, state, jnp.array([1, 1]))

        steps = jnp.swapaxes(x, 0, 1)[:, :, None]
        return jnp.swapaxes(jax.lax.scan(chunk, norm.init_state(2), steps)[1][:, :, 0], 0, 1)

    np.testing.assert_allclose(run(x), expected, atol=2e-5)


@pytest.mark.parametrize("timestep_norm", [False, True])
def test_scores_in_chunks(timestep_norm):
    scorer = ScoringNetwork(
        6, 2, timestep_norm=timestep_norm, slope=0.1, learned_slope=True, rngs=nnx.Rngs(0)
    )
    scorer.head_slope[...] = jnp.array([0.5, -2.0])
    x = jax.random.normal(jax.random.key(0), (2, 24, 6))
    state = scorer.norm.init_state(2) if timestep_norm else None
    scores, length = [[], []], np.zeros(2, int)
    for counts in ([5, 8], [0, 3], [8, 0], [8, 8], [3, 5]):
        chunk = jnp.stack([x[b, np.arange(length[b], length[b] + 8) % 24] for b in range(2)])
        positions = jnp.asarray(length)[:, None] + jnp.arange(8)
        state, out = scorer.extend(
            chunk, state, positions=positions, num_tokens=jnp.asarray(counts)
        )
        for b in range(2):
            scores[b].append(out[b, : counts[b]])
        length += counts
    expected = scorer(x)
    for b in range(2):
        np.testing.assert_allclose(jnp.concatenate(scores[b]), expected[b], atol=2e-6)
