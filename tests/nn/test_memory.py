"""Documents read in rows, with what a layer remembers between them, against whole documents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import AttentionConfig, Decoder, DecoderConfig

ATTENTION = AttentionConfig(
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    num_selected=6,
    sliding_window=5,
    implementation="reference",
)
CONFIG = DecoderConfig(vocab_size=499, num_layers=2, d_model=24, mlp_dim=16, attention=ATTENTION)
# Lengths of the documents of each lane; they end before, at and behind the borders of rows.
LANES = ([84], [30, 7, 47], [21, 42, 20, 1])
SIZE = 21
# No token comes twice in a row: the scores of its keys would be equal but for rounding.
TOKENS = jax.random.permutation(jax.random.key(0), 499)[: 3 * 84].reshape(3, 84)
POSITIONS = np.stack([np.concatenate([np.arange(n) for n in lane]) for lane in LANES])
SEGMENT_IDS = np.stack([np.repeat(np.arange(len(lane)), lane) for lane in LANES])
VARIANTS = {
    "soft": {},
    "straight through": {"gating": "straight_through"},
    "no window": {"sliding_window": 0},
    "wide window": {"sliding_window": 50},
    "all selected": {"num_selected": 100},
    "shared scores": {"shared_scores": True, "timestep_norm": False},
    "kept sinks": {"num_sinks": 2, "learned_slope": True, "slope": 0.01},
    "xla": {"implementation": "xla", "qk_norm": True},
    "window": {"kind": "window"},
    "mixed": {"pattern": ("window", "sparsek")},
    "unlearned": {"pattern": ("sinks", "random", "key_norm", "strided"), "num_sinks": 2},
}


@functools.cache
def make(variant="soft", **changes):
    attention = dataclasses.replace(ATTENTION, **VARIANTS[variant])
    changes = {"num_layers": max(2, len(attention.pattern)), **changes}
    config = dataclasses.replace(CONFIG, attention=attention, **changes)
    model = Decoder(config, rngs=nnx.Rngs(0))
    for layer in model.layers:
        scorer = getattr(layer.attention, "scorer", None)
        if scorer is not None and scorer.head_slope is not None:
            scorer.head_slope[...] = jnp.linspace(0.5, 2.0, 2)
    return model


def read(model, memory, size, rows=slice(None), first=0, last=SEGMENT_IDS.shape[1]):
    """Hidden states of the tokens from `first` to `last`, read `size` at a time, and the memory."""
    graphdef, state = nnx.split(model)
    hidden = []
    for begin in range(first, last, size):
        part = slice(begin, min(begin + size, last))
        fields = (x[rows, part] for x in (TOKENS, POSITIONS, SEGMENT_IDS))
        memory, out = resume(graphdef, state, memory, *fields)
        hidden.append(out)
    return jnp.concatenate(hidden, axis=1), memory


@functools.partial(jax.jit, static_argnums=0)
def resume(graphdef, state, memory, tokens, positions, segment_ids):
    model = nnx.merge(graphdef, state)
    memory, hidden, _ = model.resume(tokens, memory, positions=positions, segment_ids=segment_ids)
    return memory, hidden


@functools.partial(jax.jit, static_argnums=0)
def run_whole(graphdef, state, tokens, positions, segment_ids):
    return nnx.merge(graphdef, state).hidden(tokens, positions=positions, segment_ids=segment_ids)


def whole(model):
    return run_whole(*nnx.split(model), TOKENS, POSITIONS, SEGMENT_IDS)


def assert_close(x, expected, tolerance=1e-5):
    error = np.linalg.norm(x - expected) / np.linalg.norm(expected)
    assert error <= tolerance, error


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_with_memory_are_whole_documents(variant):
    model = make(variant)
    expected = whole(model)
    hidden, _ = read(model, model.init_memory(3, support_size=90), SIZE)
    for lane in range(3):
        assert_close(hidden[lane], expected[lane])


@pytest.mark.parametrize("changes", [{"scan_layers": True}, {"remat": "full"}], ids=str)
def test_of_all_ways_to_run_layers(changes):
    model = make("mixed", **changes)
    hidden, _ = read(model, model.init_memory(3, support_size=90), SIZE)
    assert_close(hidden, whole(model))


# Token by token, half of the text has borders of documents and several times what is kept.
@pytest.mark.parametrize(("size", "last"), [(1, 42), (33, 84)])
def test_of_all_sizes(size, last):
    model = make()
    hidden, _ = read(model, model.init_memory(3, support_size=90), size, last=last)
    assert_close(hidden, whole(model)[:, :last])


def test_without_memory_it_would_be_something_else():
    model = make()
    hidden = [
        read(model, model.init_memory(3, support_size=90), SIZE, first=i, last=i + SIZE)[0]
        for i in range(0, 84, SIZE)
    ]
    hidden, expected = jnp.concatenate(hidden, axis=1), whole(model)
    assert_close(hidden[:, :SIZE], expected[:, :SIZE])
    difference = np.abs(hidden - expected).max(axis=-1)
    # The last lane's second document begins with a row.
    assert_close(hidden[2, SIZE : 2 * SIZE], expected[2, SIZE : 2 * SIZE])
    assert np.min(difference[0, SIZE:]) > 1e-3


def test_a_row_that_does_not_begin_where_its_memory_ends_starts_anew():
    model = make()
    empty = model.init_memory(1, support_size=90)
    _, memory = read(model, empty, SIZE, rows=slice(1), last=2 * SIZE)
    memory = jax.tree.map(lambda x: x + jnp.nan if x.dtype == jnp.float32 else x, memory)
    skipped, after = read(model, memory, SIZE, rows=slice(1), first=3 * SIZE)
    anew, expected = read(model, empty, SIZE, rows=slice(1), first=3 * SIZE)
    np.testing.assert_array_equal(skipped, anew)
    # What a row without a past hands on is counted by its tokens, not by its position.
    for x, y in zip(*map(jax.tree.leaves, (after, expected)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert int(after[0].keys.count[0]) == SIZE


@pytest.mark.parametrize("variant", ["soft", "shared scores", "window", "unlearned"])
def test_rows_of_nothing_leave_the_memory_as_it_is(variant):
    model = make(variant)
    whole_rows = (TOKENS[:, :SIZE], POSITIONS[:, :SIZE], SEGMENT_IDS[:, :SIZE])
    memory, _ = resume(*nnx.split(model), model.init_memory(3), *whole_rows)
    for before, rows in ((model.init_memory(0), np.s_[:0]), (memory, np.s_[:, :0])):
        tokens, positions, segment_ids = (jnp.asarray(x)[rows] for x in whole_rows)
        after, hidden, _ = model.resume(
            tokens, before, positions=positions, segment_ids=segment_ids
        )
        assert hidden.shape == (*tokens.shape, 24)
        jax.tree.map(np.testing.assert_array_equal, after, before)


def test_too_small_a_support_is_approximate():
    model = make()
    expected = whole(model)
    hidden, _ = read(model, model.init_memory(3, support_size=1), SIZE)
    error = np.linalg.norm(hidden - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize(
    ("variant", "num_layers"), [("soft", 2), ("straight through", 1), ("no window", 1)]
)
def test_gradients_go_one_row_back_unless_stopped(variant, num_layers):
    graphdef, state = nnx.split(make(variant, num_layers=num_layers))
    border, end = 30, 51
    weight = jax.random.normal(jax.random.key(1), (3, end - border, CONFIG.d_model))
    first, second = (
        tuple(jnp.asarray(x[:, part]) for x in (TOKENS, POSITIONS, SEGMENT_IDS))
        for part in (slice(border), slice(border, end))
    )

    def of_whole(state):
        tokens, positions, segment_ids = (x[:, :end] for x in (TOKENS, POSITIONS, SEGMENT_IDS))
        model = nnx.merge(graphdef, state)
        hidden = model.hidden(tokens, positions=positions, segment_ids=segment_ids)
        return jnp.sum(hidden[:, border:] * weight)

    def of_rows(state, stop):
        model = nnx.merge(graphdef, state)
        memory = model.init_memory(3, support_size=90)
        for tokens, positions, segment_ids in (first, second):
            memory = jax.lax.stop_gradient(memory) if stop else memory
            memory, hidden, _ = model.resume(
                tokens, memory, positions=positions, segment_ids=segment_ids
            )
        return jnp.sum(hidden * weight)

    expected, passed, stopped = (
        by_module(jax.jit(jax.grad(function))(state))
        for function in (
            of_whole,
            functools.partial(of_rows, stop=False),
            functools.partial(of_rows, stop=True),
        )
    )
    for name, gradient in expected.items():
        assert_close(passed[name], gradient)
    for name in ("key", "value", "scorer"):
        gradient = expected[f"layers.attention.{name}"]
        difference = np.linalg.norm(stopped[f"layers.attention.{name}"] - gradient)
        assert difference > 1e-2 * np.linalg.norm(gradient)


def by_module(gradients):
    """All gradients of a module's layers as one vector; single ones can be sums that cancel."""
    modules = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        names = [str(key.key) for key in path if hasattr(key, "key")]
        module = ".".join([name for name in names if not name.isdigit()][:3])
        modules.setdefault(module, []).append(np.ravel(leaf))
    return {name: np.concatenate(leaves) for name, leaves in modules.items()}
