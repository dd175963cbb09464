"""One training step: loss, accumulation, and steps that are not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from sparsek_jax import nn
from sparsek_jax.training import sharding, trainer
from sparsek_jax.training.config import decoder_config, default_config
from sparsek_jax.training.flops import attended_keys, peak_flops, train_flops
from sparsek_jax.training.loss import token_loss
from sparsek_jax.training.metrics import MetricsWriter, StepTimer
from sparsek_jax.training.optimizer import learning_rate_schedule, make_optimizer
from sparsek_jax.training.parameters import define


def make_config(**optimizer):
    config = default_config()
    config.model.update(num_layers=1, d_model=16, mlp_dim=16)
    config.attention.update(num_heads=2, num_kv_heads=1, head_dim=8)
    config.attention.update(num_selected=3, sliding_window=3, implementation="reference")
    config.optimizer.update(warmup_steps=1, **optimizer)
    return config


def make_batch(rows=4, length=12, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 20, (rows, length + 1)).astype(np.int32)
    mask = (rng.random((rows, length)) < 0.8).astype(np.float32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "loss_mask": mask,
    }


def make_step(config):
    model_config = decoder_config(config, 20)
    definition = define(lambda: nn.Decoder(model_config, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(config)
    state = trainer._init(config, model_config, optimizer)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    rows = NamedSharding(mesh, sharding.ROWS)
    step = jax.jit(functools.partial(trainer.train_step, definition, optimizer, config, 5, rows))
    return step, state


def test_token_losses_equal_unchunked_cross_entropy():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 13, 8)).astype(np.float32)
    table = rng.normal(size=(20, 8)).astype(np.float32)
    targets = rng.integers(0, 20, (2, 13))

    def total(hidden, table, chunk_size):
        loss = token_loss(table, hidden, jnp.asarray(targets), chunk_size=chunk_size)
        return jnp.sum(loss.nats) + 0.1 * jnp.sum(loss.log_z**2), loss

    def unchunked(hidden, table):
        logits = jnp.einsum("btd,vd->btv", hidden, table, precision="highest")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        scores = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum(log_z - scores) + 0.1 * jnp.sum(log_z**2)

    logits = hidden.astype(np.float64) @ table.T.astype(np.float64)
    log_z = np.log(np.sum(np.exp(logits), -1))
    expected = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    whole = jax.grad(unchunked, argnums=(0, 1))(hidden, table)
    for chunk_size in (1, 5, 13, 100):
        (_, loss), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
            hidden, table, chunk_size
        )
        np.testing.assert_allclose(loss.nats, expected, rtol=1e-5)
        np.testing.assert_allclose(loss.log_z, log_z, rtol=1e-5)
        np.testing.assert_array_equal(loss.likeliest, logits.argmax(-1) == targets)
        for x, y in zip(gradients, whole, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_accumulation_equals_the_whole_batch():
    results = []
    for pieces in (1, 4):
        step, state = make_step(make_config(accumulate=pieces, z_loss=1e-2))
        for seed in range(3):
            state, metrics = step(state, make_batch(seed=seed))
        results.append((state["params"], metrics))
    (whole, whole_metrics), (params, metrics) = results
    assert metrics["loss"] == pytest.approx(float(whole_metrics["loss"]), rel=1e-5)
    for name, x in params.items():
        np.testing.assert_allclose(x, whole[name], atol=2e-4)


def test_masked_targets_have_no_influence():
    step, state = make_step(make_config())
    batch = make_batch()
    changed = dict(batch, targets=np.where(batch["loss_mask"] > 0, batch["targets"], 7))
    (a, metrics_a), (b, metrics_b) = step(state, batch), step(state, changed)
    assert metrics_a["loss"] == metrics_b["loss"]
    assert metrics_a["targets"] == batch["loss_mask"].sum()
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_step_that_is_not_finite_changes_nothing_but_the_counters():
    step, state = make_step(make_config())
    state, _ = step(state, make_batch())
    poisoned = make_batch(seed=1)
    poisoned["loss_mask"][0, 0] = np.inf
    after, metrics = step(state, poisoned)
    assert not np.isfinite(metrics["loss"])
    assert (metrics["bad_in_row"], metrics["skipped_steps"]) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])
    inner = ("optimizer", "inner")
    jax.tree.map(
        np.testing.assert_array_equal, after[inner[0]][inner[1]], state[inner[0]][inner[1]]
    )
    again, metrics = step(after, poisoned)
    assert (metrics["bad_in_row"], metrics["skipped_steps"]) == (2, 2)
    good, metrics = step(again, make_batch(seed=2))
    assert (metrics["bad_in_row"], metrics["skipped_steps"]) == (0, 2)
    expected, _ = step(state, make_batch(seed=2))
    jax.tree.map(np.testing.assert_array_equal, good["params"], expected["params"])


def test_bad_steps_in_a_row_stop_the_run_and_name_their_documents(tmp_path, monkeypatch):
    config = make_config()
    config.data.glob = f"{tmp_path}/*.txt"
    config.data.root = str(tmp_path / "root")
    config.data.seq_len = 16
    config.train.update(steps=9, batch_size=2, max_bad_steps=3, eval_every=0, checkpoint_every=2)
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 9)
    original = trainer._loss

    def poisoned(*arguments):
        loss, past = original(*arguments)
        return loss._replace(nats=loss.nats * jnp.nan), past

    monkeypatch.setattr(trainer, "_loss", poisoned)
    with pytest.raises(trainer.TrainingDivergedError, match="3 steps in a row up to step 3"):
        trainer.train(config, tmp_path / "run")
    lines = (tmp_path / "run" / "bad_batches.0.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert ".txt" in lines[0]
    # The checkpoint that was being written is complete.
    assert (tmp_path / "run" / "manifests" / "2.json").exists()


def test_weight_decay_and_schedule():
    config = make_config(weight_decay=0.5, clip_norm=0.0)
    optimizer = make_optimizer(config)
    params = {"a.kernel": jnp.ones((2, 2)), "a.bias": jnp.ones(2), "norm.scale": jnp.ones(2)}
    state = optimizer.init(params)
    schedule = learning_rate_schedule(config)
    peak = config.optimizer.learning_rate
    np.testing.assert_allclose([schedule(0), schedule(1)], [peak / 2, peak], rtol=1e-6)
    np.testing.assert_allclose(schedule(config.train.steps), peak / 10, rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        updates, state = optimizer.update(zero, state, params)
        params = optax.apply_updates(params, updates)
    assert np.all(params["a.kernel"] < 1)
    np.testing.assert_array_equal(params["a.bias"], 1)
    np.testing.assert_array_equal(params["norm.scale"], 1)


@pytest.mark.parametrize(
    ("kind", "k", "w"),
    [("sparsek", 3, 4), ("sparsek", 3, 0), ("dense", 1, 1), ("sinks", 3, 4), ("lsh", 4, 4)],
)
def test_flops_count_attended_keys_only(kind, k, w):
    expected = sum(
        t + 1 if kind == "dense" else min(w, t + 1) + min(k, max(t + 1 - w, 0)) for t in range(20)
    )
    positions = np.arange(20)
    assert attended_keys(kind, positions, num_selected=k, sliding_window=w) == expected
    # Two packed documents of ten.
    packed = attended_keys(kind, positions % 10, num_selected=k, sliding_window=w)
    assert packed == 2 * attended_keys(kind, positions[:10], num_selected=k, sliding_window=w)


@pytest.mark.parametrize(("kind", "k", "w"), [("bigbird", 6, 4), ("moba", 6, 3), ("nsa", 6, 4)])
def test_flops_of_blocks(kind, k, w):
    past = [t // 3 * 3 for t in range(20)]
    selected = sum(t + 1 - past[t] + min(past[t], k - 3) for t in range(20))
    expected = {
        "nsa": selected + sum(min(w, t + 1) + (t + 1) // 3 for t in range(20)),
        "bigbird": sum(min(k + w, t + 1) for t in range(20)),
        "moba": sum(t + 1 - past[t] + min(past[t], k + w - 3) for t in range(20)),
    }
    sizes = {"num_selected": k, "sliding_window": w, "block_size": 3}
    assert attended_keys(kind, np.arange(20), **sizes) == expected[kind]


def test_flops_of_a_row_by_hand():
    attention = nn.AttentionConfig(kind="dense", num_heads=2, num_kv_heads=1, head_dim=4)
    config = nn.DecoderConfig(
        vocab_size=10, num_layers=3, d_model=8, mlp_dim=16, attention=attention
    )
    per_layer = 5 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 2 * 8 * 15
    assert train_flops(config, np.arange(5)) == 6 * (3 * per_layer + 5 * 8 * 10)
    assert attended_keys("gated_linear", np.arange(9), num_selected=3, sliding_window=4) == 30
    for kind, pairs, more in (
        # Rank and heads of the gates, the rank's outputs, and state times keys and queries.
        ("gated_linear", 2 + 2 + 2 + 2 + 1, 5 * (8 * (1 + 2) + 1 * 4 + 4 * 4 + 8 * 4)),
        # Scorer and gates, and state times keys and queries.
        ("sparsek_linear", 1 + 2 + 3 + 4 + 5, 5 * (8 * (1 + 2) + 4 * 4 + 8 * 4)),
        # Gates, and MLPs of width 1 on keys and on values.
        ("nsa", 9 + (1 + 2 + 3 + 4 + 3) + (1 + 1 + 2 + 2), 5 * (8 * 3 * 2 + 2 * 2 * 4)),
        # Products with 32 directions in each of 4 rounds.
        ("lsh", 1 + 2 + 3 + 4 + 5, 5 * (2 + 1) * 4 * 4 * 32),
        # Half of a pair for a query and a mean key.
        ("moba", 1 + 2 + 3 + 4 + 5 + (1 + 1 + 2) / 2, 0),
    ):
        sizes = {"num_selected": 4, "sliding_window": 2, "block_size": 2}
        attention = nn.AttentionConfig(kind=kind, num_heads=2, num_kv_heads=1, head_dim=4, **sizes)
        changed = dataclasses.replace(config, attention=attention)
        expected = per_layer + 2 * 8 * (pairs - 15) + more
        assert train_flops(changed, np.arange(5)) == 6 * (3 * expected + 5 * 8 * 10), kind
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


def test_metrics_of_a_killed_run_are_cut_where_it_resumes(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=1)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step) if step != 2 else float("nan")})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    writer = MetricsWriter(tmp_path, first_step=3)
    writer.write(3, {"loss": 30.0})
    writer.close()
    assert path.read_text().splitlines() == [
        '{"step": 1, "loss": 1.0}',
        '{"step": 2, "loss": null}',
        '{"step": 3, "loss": 30.0}',
    ]


def test_step_timer_leaves_pauses_out(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 100.0, 101.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = StepTimer()
    for _ in range(3):
        timer.step_finished()
    timer.pause()
    timer.step_finished()
    timer.step_finished()
    assert timer.read() == 1.0
