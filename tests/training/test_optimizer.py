"""Scorers that move first, and rates of their own for scorers and layers."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsek_jax import nn
from sparsek_jax.training import trainer
from sparsek_jax.training.config import ConfigError, decoder_config, validate_config
from sparsek_jax.training.optimizer import learning_rate_schedule, make_optimizer
from sparsek_jax.training.parameters import is_scorer, split, stack_layers, unstack_layers
from sparsek_jax.training.workdir import check_same_run, write_json
from tests.training.helpers import write_corpus
from tests.training.test_step import make_config


def updates_of(config, gradients, params, count):
    """What each of some updates adds to the parameters, all with the same gradients."""
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    found = []
    for _ in range(count):
        updates, state = jax.jit(optimizer.update)(gradients, state, params)
        found.append(updates)
    return found


def make_params(config):
    model = nn.Decoder(decoder_config(config, 20), rngs=nnx.Rngs(0))
    return split(model)[1]


def some_gradients(params):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=x.shape), x.dtype) for name, x in params.items()}


def test_defaults_are_plain_adamw():
    config = make_config()
    optimizer = config.optimizer
    plain = optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask=lambda params: {
                name: name.endswith(("kernel", "embedding", "output")) for name in params
            },
        ),
    )
    params = make_params(config)
    gradients = some_gradients(params)
    state = plain.init(params)
    # What was saved by earlier versions can be resumed.
    assert jax.tree.structure(state) == jax.tree.structure(make_optimizer(config).init(params))
    for updates in updates_of(config, gradients, params, 3):
        expected, state = jax.jit(plain.update)(gradients, state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_only_scorers_move_at_first_and_the_rest_begins_as_a_run_of_its_own():
    config = make_config(freeze_steps=2, weight_decay=0.5)
    config.attention.pattern = ("sparsek_linear",)
    params = make_params(config)
    gradients = some_gradients(params)
    found = updates_of(config, gradients, params, 5)
    for step, updates in enumerate(found):
        for name, update in updates.items():
            assert np.any(update != 0) == (step >= 2 or is_scorer(name)), (step, name)
    # The rest of the run, as if it began there.
    config.train.steps -= 2
    config.optimizer.freeze_steps = 0
    for updates, expected in zip(found[2:], updates_of(config, gradients, params, 3), strict=True):
        for name in params:
            if not is_scorer(name):
                np.testing.assert_array_equal(updates[name], expected[name])


def test_frozen_gradients_do_not_count_when_clipping():
    config = make_config(freeze_steps=1, eps=1.0)  # so that the size of a gradient matters
    params = make_params(config)
    gradients = some_gradients(params)
    scorers = {name: x for name, x in gradients.items() if is_scorer(name)}
    alone = scorers | {
        name: jnp.zeros_like(x) for name, x in gradients.items() if not is_scorer(name)
    }
    assert optax.tree.norm(scorers) > 1
    (updates,), (expected,) = (updates_of(config, g, params, 1) for g in (gradients, alone))
    for name in scorers:
        np.testing.assert_array_equal(updates[name], expected[name])


def test_schedules_of_a_run_that_freezes():
    config = make_config(freeze_steps=3, scorer_learning_rate=1e-2, learning_rate=1e-3)
    rates = np.array([learning_rate_schedule(config)(step) for step in range(6)])
    np.testing.assert_array_equal(rates[:3], 0)
    np.testing.assert_allclose(rates[3:5], [5e-4, 1e-3], rtol=1e-5)
    assert rates[5] < rates[4]
    schedule = learning_rate_schedule(config, scorers=True)
    np.testing.assert_allclose([schedule(0), schedule(1)], [5e-3, 1e-2], rtol=1e-5)
    for scorers, peak in ((False, 1e-3), (True, 1e-2)):
        last = learning_rate_schedule(config, scorers=scorers)(config.train.steps)
        np.testing.assert_allclose(last, peak / 10, rtol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_scorers_and_layers_have_rates_of_their_own(scan_layers):
    rates = {"layer_decay": 0.5, "scorer_learning_rate": 3e-3}
    config = make_config(clip_norm=0.0, learning_rate=1e-3)
    config.model.update(num_layers=4, scan_layers=scan_layers, tie_embeddings=False)
    config.attention.pattern = ("sparsek", "window")
    params = make_params(config)
    gradients = some_gradients(params)
    (plain,) = updates_of(config, gradients, params, 1)
    config.optimizer.update(rates)
    (own,) = updates_of(config, gradients, params, 1)
    model = decoder_config(config, 20)
    own, plain = unstack_layers(own, model), unstack_layers(plain, model)
    assert len([name for name in own if name.startswith("layers.3.")]) > 5
    for name, update in own.items():
        if is_scorer(name):
            factor = 3
        elif name.startswith("layers."):
            factor = 0.5 ** (3 - int(name.split(".")[1]))
        else:
            factor = {"embedding": 0.5**4}.get(name, 1)
        np.testing.assert_allclose(update, factor * plain[name], rtol=1e-6, err_msg=name)


def test_stacked_layers_move_as_those_by_themselves():
    config = make_config(clip_norm=0.0, layer_decay=0.7, scorer_learning_rate=5e-3, freeze_steps=1)
    config.model.num_layers = 4
    config.attention.pattern = ("window", "sparsek")
    params = make_params(config)
    gradients = some_gradients(params)
    expected = updates_of(config, gradients, params, 3)
    config.model.scan_layers = True
    model = decoder_config(config, 20)
    found = updates_of(config, stack_layers(gradients, model), stack_layers(params, model), 3)
    for updates, alone in zip(found, expected, strict=True):
        for name, update in unstack_layers(updates, model).items():
            np.testing.assert_allclose(update, alone[name], rtol=1e-6, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["dense", "window"])
def test_attention_without_scorers_is_trained_from_the_first_step(kind):
    config = make_config(freeze_steps=5)
    config.attention.kind = kind
    params = make_params(config)
    gradients = some_gradients(params)
    found = updates_of(config, gradients, params, 2)
    config.optimizer.freeze_steps = 0
    for updates, expected in zip(found, updates_of(config, gradients, params, 2), strict=True):
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert learning_rate_schedule(config)(0) > 0


def test_freezing_that_leaves_no_steps_is_named():
    config = make_config(freeze_steps=999)
    with pytest.raises(ConfigError, match=r"freeze_steps=999 and then .*warmup_steps=1; expected"):
        validate_config(config, device_count=1)


def test_a_run_stopped_while_frozen_goes_on_to_the_bit(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "text")
    config = make_config(freeze_steps=3, scorer_learning_rate=1e-2, layer_decay=0.5)
    config.data.update(glob=f"{corpus}/*.txt", root=f"{corpus}/prepared", seq_len=16)
    config.sample.length = 0
    config.attention.implementation = "reference"  # which compiles fastest
    config.train.update(steps=5, batch_size=2, eval_every=0, eval_batches=1, log_every=1)
    straight = trainer.train(config, tmp_path / "straight")

    class Stop:
        name = "SIGTERM"

        def __call__(self, step):
            return step == 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "stop_signals", lambda *_, **__: Stop())
        stopped = trainer.train(copy.deepcopy(config), tmp_path / "run")
    assert (stopped.step, stopped.finished) == (2, False)
    resumed = trainer.train(config, tmp_path / "run")
    assert resumed.finished
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    for field, scorers in (("learning_rate", False), ("scorer_learning_rate", True)):
        schedule = learning_rate_schedule(config, scorers=scorers)
        expected = [schedule(step) for step in range(5)]
        np.testing.assert_allclose([row[field] for row in rows], expected, rtol=1e-6)
    first, second = (split(result.model)[1] for result in (straight, resumed))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    model_config = decoder_config(config, straight.corpus.tokenizer.vocab_size)
    # Under a jit, as in the run: the compiler rounds otherwise.
    optimizer = make_optimizer(config)
    initial = jax.jit(lambda: trainer._init(config, model_config, optimizer))()["params"]
    moved = {name for name, x in split(stopped.model)[1].items() if np.any(x != initial[name])}
    scorers = {name for name in initial if is_scorer(name)}
    assert moved == scorers


def test_the_number_of_frozen_steps_stays_that_of_the_run(tmp_path):
    config = make_config()
    write_json(tmp_path / "config.json", json.loads(config.to_json()))
    check_same_run(config, tmp_path)
    config.optimizer.freeze_steps = 1
    with pytest.raises(ConfigError, match=r"optimizer\.freeze_steps=1, but the run in"):
        check_same_run(config, tmp_path)
