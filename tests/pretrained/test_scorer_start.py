"""Scorers that start from a text: what their kernels are, and the directory that holds them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax import nn
from sparsek_jax.generation.loading import load_run
from sparsek_jax.nn import DenseAttention
from sparsek_jax.pretrained.calibrating import calibrate_model
from sparsek_jax.pretrained.families import AttentionOptions
from sparsek_jax.pretrained.importing import import_model
from sparsek_jax.pretrained.scorer_start import (
    METHODS,
    Moments,
    far_attention,
    log_importance,
    mean_query_kernel,
    ridge,
    scorer_starts,
    selection_divergence,
)
from sparsek_jax.training.checkpoint import save_params
from sparsek_jax.training.config import ConfigError
from sparsek_jax.training.parameters import split, stack_layers
from sparsek_jax.training.workdir import load_config, save_import
from tests.pretrained import models
from tests.pretrained.test_runs import convert

ATTENTION = nn.AttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, num_selected=8, sliding_window=4
)
CONFIG = nn.DecoderConfig(vocab_size=48, num_layers=2, d_model=16, mlp_dim=24, attention=ATTENTION)


@pytest.mark.parametrize("fields", [{}, {"rotary_fraction": 0.5}, {"qk_norm": True}])
def test_the_mean_query_kernel_gives_the_logits_of_that_query(fields):
    config = dataclasses.replace(ATTENTION, kind="dense", **fields)
    layer = DenseAttention(config, 16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 7, 16))
    distances = jnp.array([3, 5, 11])
    if config.qk_norm:
        layer.key_norm.scale[...] = jnp.linspace(0.5, 2, 8)
    query = layer.query(x)[0, 3].reshape(4, 8)
    if config.qk_norm:
        query = layer.query_norm(query)
    expected = 0
    for distance in distances:
        # The logit depends on the distance only: the query stays at 0, keys lie before it.
        _, key, _ = layer._project(x, jnp.full((1, 7), -distance))
        pairs = key[0].reshape(7, 2, 1, 8) * query.reshape(1, 2, 2, 8)
        expected += pairs.sum(-1).mean(-1) / len(distances)
    scores = x[0] @ mean_query_kernel(layer, query, distances)
    if config.qk_norm:
        keys = layer.key(x)[0].reshape(7, 2, 8)
        scores *= jax.lax.rsqrt(jnp.mean(keys**2, axis=-1) + 1e-6)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "window"), [(300, 7), (128, 1), (5, 2)])
def test_far_attention_is_what_queries_beyond_the_window_attend(length, window):
    query, key = (
        np.asarray(2 * jax.random.normal(jax.random.key(seed), (length, heads, 8)))
        for seed, heads in ((0, 6), (1, 2))
    )
    expected = np.zeros((length, 2))
    for head in range(6):
        logits = query[:, head] @ key[:, head // 3].T / np.sqrt(8)
        weights = np.tril(np.exp(logits))
        weights /= weights.sum(1, keepdims=True)
        expected[:, head // 3] += np.tril(weights, -window).sum(0) / 3
    found = far_attention(jnp.asarray(query), jnp.asarray(key), sliding_window=window)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_scores", [2, 1])
def test_the_divergence_is_that_from_dense_attention(num_scores):
    length, window, selected = 150, 7, 20
    query, key = (
        np.asarray(jax.random.normal(jax.random.key(seed), (length, heads, 8)))
        for seed, heads in ((0, 6), (1, 2))
    )
    scores = np.random.default_rng(0).integers(0, 40, (length, 3, num_scores)).astype(np.float32)
    expected = np.zeros((3, 2))
    for t in range(length):
        pool = np.arange(t - window + 1)
        for head in range(6):
            logits = key[: t + 1, head // 3] @ query[t, head] / np.sqrt(8)
            dense = np.exp(logits) / np.exp(logits).sum()
            for i in range(3):
                by_score = scores[pool, i, head // 3 if num_scores == 2 else 0]
                best = np.argsort(-by_score, kind="stable")[:selected]
                seen = np.union1d(best, np.arange(max(t - window + 1, 0), t + 1))
                sparse = np.exp(logits[seen]) / np.exp(logits[seen]).sum()
                expected[i, head // 3] += (sparse * np.log(sparse / dense[seen])).sum() / 3
    found = selection_divergence(
        *map(jnp.asarray, (query, key, scores)), num_selected=selected, sliding_window=window
    )
    if num_scores == 1:
        expected = expected.mean(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_importance_is_found_under_attention_that_fades():
    length, window = 90, 7
    rates = np.array([0.0, 0.02, 0.5])
    importance = np.random.default_rng(0).normal(size=(length, 2))
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    for i, rate in enumerate(rates):
        fading = np.where(distance >= window, np.exp(-rate * np.maximum(distance, 0)), 0)
        mass = 1e-3 * np.exp(importance) * fading.sum(0)[:, None]
        found = log_importance(jnp.asarray(mass), rates, sliding_window=window)
        assert found.shape == (length, 3, 2)
        error = np.asarray(found[:-window, i]) - importance[:-window]
        np.testing.assert_allclose(error, error.mean(), atol=1e-4)


def test_ridge_recovers_a_planted_linear_score():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(16, 2))
    rows = []
    for _ in range(3):
        x = rng.normal(size=(50, 16)) * np.linspace(0.1, 3, 16) + 5
        rows.append(Moments.of(rng.uniform(size=50), x, x @ kernel - 7))
    moments = rows[0] + rows[1] + rows[2]
    np.testing.assert_allclose(ridge(moments, strength=1e-12), kernel, rtol=1e-6)
    assert np.linalg.norm(ridge(moments, strength=1.0)) < np.linalg.norm(kernel)


def test_scores_have_the_scale_asked_for_and_follow_the_target():
    _, params = split(nn.Decoder(CONFIG, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 48, (3, 40))
    found = dict(scorer_starts(params, CONFIG, tokens, methods=METHODS, scale=2.0))
    assert list(found) == [0, 1]
    x = np.asarray(params["embedding"])[tokens]
    x /= np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps)
    weight = np.minimum(np.maximum(40 - 4 - np.arange(40), 0) / 10, 1)
    for start in found[0].values():
        for head in range(2):
            scores = (x @ start.kernel[:, head]).ravel()
            variance = np.cov(scores, aweights=np.tile(weight, 3), ddof=0)
            np.testing.assert_allclose(variance, 4, rtol=1e-3)
    keys = (x @ np.asarray(params["layers.0.attention.key.kernel"])).reshape(3, 40, 2, 8)
    lengths = np.linalg.norm(keys[:, :, 0], axis=-1).ravel()
    scores = (x @ found[0]["key_norm"].kernel[:, 0]).ravel()
    assert np.corrcoef(lengths, scores)[0, 1] < -0.3


def test_shared_scores_and_other_kinds_of_layers():
    kinds = ("window", "sparsek_linear")
    attention = dataclasses.replace(ATTENTION, pattern=kinds, shared_scores=True)
    config = dataclasses.replace(CONFIG, attention=attention)
    _, params = split(nn.Decoder(config, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 48, (2, 40))
    ((layer, starts),) = scorer_starts(params, config, tokens, methods=METHODS)
    assert layer == 1
    for start in starts.values():
        assert start.kernel.shape == (16, 1)
        assert start.slope.shape == (1,)
        assert np.isfinite(start.kernel).all()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """An import with k + w = 12, and a text."""
    directory = tmp_path_factory.mktemp("start")
    options = AttentionOptions(num_selected=8, sliding_window=4)
    import_model(models.source(directory, "llama3"), directory / "run", options=options)
    words = np.random.default_rng(0).integers(2, 48, 200)
    (directory / "text").write_text(" ".join(f"w{i}" for i in words))
    return directory


def test_the_command_changes_scorers_only(imported, tmp_path):
    run, text = imported / "run", imported / "text"
    result = convert(
        "calibrate",
        f"--workdir={run}",
        f"--to={tmp_path}/new",
        f"--text={text}",
        "--length=64",
        "--scale=2",
        "--num_sinks=3",
        "--timestep_norm",
        "--gating=straight_through",
    )
    assert result.returncode == 0, result.stderr
    assert "new scorers in 2 layers from 192 tokens" in result.stdout
    (_, before), (_, after) = (split(load_run(path).model) for path in (run, tmp_path / "new"))
    assert {name for name in after if not name.endswith("scorer.head_slope")} == before.keys()
    for name, array in before.items():
        if name.endswith("scorer.norm.gain"):
            np.testing.assert_array_equal(after[name], 2)
        elif ".scorer." in name:
            assert not np.allclose(after[name], array)
        else:
            np.testing.assert_array_equal(after[name], array, err_msg=name)
    attention = load_config(tmp_path / "new").attention
    assert (attention.gating, attention.num_sinks) == ("straight_through", 3)
    assert after["layers.1.attention.scorer.head_slope"].min() >= 0
    record = json.loads((tmp_path / "new" / "run.json").read_text())["imported"]
    assert record["calibration"]["texts"] == [str(text)]
    assert record["context_length"] > 0
    moved = (tmp_path / "new").rename(tmp_path / "moved")
    assert load_config(moved).data.tokenizer == str(moved / "tokenizer" / "tokenizer.json")


def test_while_all_keys_are_within_reach_the_logits_are_the_dense_ones(imported, tmp_path):
    texts = [imported / "text"]
    calibrate_model(
        imported / "run", tmp_path / "new", texts, method="mean_query", scale=50.0, length=100
    )
    assert not load_config(tmp_path / "new").attention.timestep_norm
    tokens, logits = models.expected("llama3")
    found = models.logits(tmp_path / "new", tokens)
    np.testing.assert_allclose(found[:, :12], logits[:, :12], atol=1e-4)
    assert not np.allclose(found[:, 12:], logits[:, 12:], atol=1e-2)


def test_without_slopes_heads_do_not_forget(imported, tmp_path):
    calibrate_model(
        imported / "run", tmp_path / "new", [imported / "text"], length=64, learned_slope=False
    )
    assert not load_config(tmp_path / "new").attention.learned_slope
    _, params = split(load_run(tmp_path / "new").model)
    assert not any("head_slope" in name for name in params)


def test_stacked_layers_get_the_same_scorers(imported, tmp_path):
    config = load_config(imported / "run")
    _, params = split(load_run(imported / "run").model)
    config.model.scan_layers = True
    (tmp_path / "run").mkdir()
    tokenizer = shutil.copytree(imported / "run" / "tokenizer", tmp_path / "run" / "tokenizer")
    record = {"context_length": 64}
    save_import(tmp_path / "run", config, tokenizer=tokenizer / "tokenizer.json", source=record)
    stacked = dataclasses.replace(load_run(imported / "run").model.config, scan_layers=True)
    save_params(tmp_path / "run", stack_layers(params, stacked))
    found = []
    for name, origin in (("one", tmp_path / "run"), ("two", imported / "run")):
        calibrate_model(origin, tmp_path / name, [imported / "text"], length=90)
        found.append(load_run(tmp_path / name).model)
    kernel = found[0].layers[0].attention.scorer.kernel[...]
    for i, one in enumerate(kernel):
        np.testing.assert_array_equal(one, found[1].layers[i].attention.scorer.kernel[...])


def test_a_dense_model_becomes_a_sparse_one(imported, tmp_path):
    options = AttentionOptions(kind="dense")
    import_model(imported / "llama3", tmp_path / "dense", options=options)
    text = [imported / "text"]
    calibrate_model(imported / "run", tmp_path / "expected", text, length=64)
    become = {"kind": "sparsek", "num_selected": 8, "sliding_window": 4}
    calibrate_model(tmp_path / "dense", tmp_path / "new", text, length=64, **become)
    found, expected = (load_run(tmp_path / name).model for name in ("new", "expected"))
    assert found.config == expected.config
    found, expected = split(found)[1], split(expected)[1]
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"length": 201},
            r"--text holds too few tokens .*text 200.; expected at least --length=201",
        ),
        ({"length": 4}, "--length=4; expected more than attention.sliding_window=4"),
        ({"method": "zero"}, "--method='zero'; expected one of attention_mass"),
        ({"scale": 0.0}, r"--scale=0.0; expected a finite number above 0"),
        ({"num_sinks": 9}, "attention.num_sinks=9; expected an int from 0 to .*num_selected=8"),
        ({"kind": "nsa"}, "--kind=nsa; expected sparsek, or none"),
        ({"gating": "hard"}, "attention.gating='hard'; expected one of"),
        ({"texts": ["missing"]}, "No such file.*missing"),
        ({"texts": ["binary"]}, "binary'.*expected UTF-8 text"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(change, match, imported, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    texts = [tmp_path / name for name in change.pop("texts", [])] or [imported / "text"]
    with pytest.raises((ConfigError, OSError), match=match):
        calibrate_model(imported / "run", tmp_path / "new", texts, **{"length": 64} | change)
    assert not (tmp_path / "new").exists()


def test_a_model_without_scorers_is_refused(imported, tmp_path):
    options = AttentionOptions(kind="dense")
    import_model(imported / "llama3", tmp_path / "dense", options=options)
    with pytest.raises(ConfigError, match="has no layer of kind sparsek, and so no scorers"):
        calibrate_model(tmp_path / "dense", tmp_path / "new", [imported / "text"], length=64)
    with pytest.raises(ConfigError, match=r"--to=.*exists; expected a new or an empty directory"):
        calibrate_model(imported / "run", tmp_path / "dense", [imported / "text"], length=64)
