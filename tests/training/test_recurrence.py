"""Training on rows that go on from the rows before."""

import contextlib
import functools
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax import nn
from sparsek_jax.training import sharding, trainer
from sparsek_jax.training.config import ConfigError, decoder_config, default_config
from sparsek_jax.training.optimizer import make_optimizer
from sparsek_jax.training.parameters import define, split
from sparsek_jax.training.recurrence import no_past, resumed_states
from tests.training.helpers import losses, write_corpus

LENGTH = 12


def make_config(**train):
    config = default_config()
    config.model.update(num_layers=1, d_model=16, mlp_dim=16)
    config.attention.update(num_heads=2, num_kv_heads=1, head_dim=8)
    config.attention.update(num_selected=3, sliding_window=3, implementation="reference")
    config.data.seq_len = LENGTH
    config.optimizer.warmup_steps = 1
    config.train.update(batch_size=4, recurrent=True, **train)
    return config


def make_batches(count, rows=4):
    """Of documents of 20, 21, ... tokens, one after another in every row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (rows, count * LENGTH + 1)).astype(np.int32)
    positions = np.stack([np.arange(count * LENGTH) % (20 + i) for i in range(rows)])
    ids = np.cumsum(positions == 0, axis=1)
    batches = []
    for i in range(count):
        part = slice(i * LENGTH, (i + 1) * LENGTH)
        fields = {"inputs": tokens[:, part], "targets": tokens[:, 1:][:, part]}
        fields |= {"positions": positions[:, part], "segment_ids": ids[:, part]}
        batches.append({name: x.astype(np.int32) for name, x in fields.items()})
        batches[-1]["loss_mask"] = np.ones((rows, LENGTH), np.float32)
    return batches


def make_step(config):
    model_config = decoder_config(config, 20)
    definition = define(lambda: nn.Decoder(model_config, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(config)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    rows = jax.sharding.NamedSharding(mesh, sharding.ROWS)
    step = jax.jit(functools.partial(trainer.train_step, definition, optimizer, config, 5, rows))
    return step, trainer._init(config, model_config, optimizer)


@pytest.fixture(scope="module")
def plain():
    return make_step(make_config())


def test_a_step_learns_from_what_the_step_before_remembered(plain):
    step, state = plain
    first, second, _ = make_batches(3)
    after, _ = step(state, first)
    np.testing.assert_array_equal(after["past"]["memory"][0].keys.position, LENGTH)
    _, metrics = step(after, second)
    _, forgot = step({**after, "past": state["past"]}, second)
    assert abs(float(metrics["loss"]) - float(forgot["loss"])) > 1e-4
    # Where the second row's documents begin with it, nothing goes on.
    anew = second | {"positions": np.tile(np.arange(LENGTH, dtype=np.int32), (4, 1))}
    _, metrics = step(after, anew)
    _, forgot = step({**after, "past": state["past"]}, anew)
    assert float(metrics["loss"]) == float(forgot["loss"])


def test_microbatches_have_the_past_of_their_rows():
    config = make_config(recurrent_gradient=True)
    step, state = make_step(config)
    config.optimizer.accumulate = 2
    in_pieces, _ = make_step(config)
    states = [state, state]
    for batch in make_batches(3):
        states, metrics = zip(
            *(f(s, batch) for f, s in zip((step, in_pieces), states, strict=True)), strict=True
        )
        assert float(metrics[0]["loss"]) == pytest.approx(float(metrics[1]["loss"]), rel=1e-5)
        norms = [float(m["gradient_norm"]) for m in metrics]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for x, y in zip(*(jax.tree.leaves(s["past"]) for s in states), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-3)


def test_a_step_that_is_left_out_does_not_poison_the_past(plain):
    step, state = plain
    first, second, third = make_batches(3)
    state, _ = step(state, first)
    second = second | {"inputs": np.full((4, LENGTH), 999, np.int32)}
    after, metrics = step(state, second)
    assert not np.isfinite(metrics["loss"])
    for x, y in zip(*(jax.tree.leaves(s["past"]) for s in (after, state)), strict=True):
        np.testing.assert_array_equal(x, y)
    _, metrics = step(after, third)
    # The rows in between are missing, so that nothing goes on from before them.
    _, forgot = step({**after, "past": jax.tree.map(jnp.zeros_like, state["past"])}, third)
    assert np.isfinite(metrics["loss"])
    assert float(metrics["loss"]) == float(forgot["loss"])


def test_gradients_that_go_one_row_back_are_those_of_both_rows_as_one():
    config = make_config()
    definition, params = split(nn.Decoder(decoder_config(config, 20), rngs=nnx.Rngs(0)))
    first, second = make_batches(2)
    both = {name: np.concatenate([first[name], second[name]], axis=1) for name in first}
    weight = jax.random.normal(jax.random.key(1), (4, LENGTH, 16))

    def of_whole(params):
        model = definition.merge(params)
        hidden = model.hidden(
            both["inputs"], positions=both["positions"], segment_ids=both["segment_ids"]
        )
        return jnp.sum(hidden[:, LENGTH:] * weight)

    def of_rows(params, row_length):
        model = definition.merge(params)
        past, _, _ = resumed_states(model, no_past(model, 4, row_length), first)
        # What reaches the next step is a number: gradients come from nothing but its row.
        _, hidden, _ = resumed_states(model, jax.lax.stop_gradient(past), second)
        return jnp.sum(hidden * weight)

    expected = jax.jit(jax.grad(of_whole))(params)
    passed = jax.jit(jax.grad(lambda params: of_rows(params, LENGTH)))(params)
    stopped = jax.jit(jax.grad(lambda params: of_rows(params, None)))(params)
    key = "layers.0.attention.key.kernel"
    for name in (key, "layers.0.attention.scorer.kernel", "embedding"):
        error = np.linalg.norm(passed[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error <= 1e-5, name
    assert np.linalg.norm(stopped[key] - expected[key]) > 1e-2 * np.linalg.norm(expected[key])


def test_a_run_resumes_bitwise_with_its_past(tmp_path):
    config = make_config(recurrent_gradient=True, steps=6, checkpoint_every=3, log_every=1)
    corpus = write_corpus(tmp_path / "corpus")
    config.data.update(glob=f"{corpus}/*.txt", root=str(tmp_path / "prepared"))
    config.train.update(eval_every=6, eval_batches=2)
    config.attention.kind = "window"
    config.attention.pattern = ("window", "sparsek")
    config.model.num_layers = 2
    config.sample.length = 0
    config.optimizer.accumulate = 2

    def run(workdir):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            result = trainer.train(config, workdir)
        return split(result.model)[1], output.getvalue()

    straight, _ = run(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "6")
    (tmp_path / "killed" / "manifests" / "6.json").unlink()
    resumed, output = run(tmp_path / "killed")
    assert "resuming from step 3" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    for name, expected in straight.items():
        np.testing.assert_array_equal(resumed[name], expected)
    # Documents are longer than four rows: the fourth step's rows have a past.
    assert (tmp_path / "killed" / "checkpoints" / "3" / "past").is_dir()
    config.train.recurrent_gradient = False
    with pytest.raises(ConfigError, match=r"train\.recurrent_gradient=False, but the run"):
        trainer.train(config, tmp_path / "killed")
