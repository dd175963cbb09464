"""The training loop: one jitted step over a mesh, validation, checkpoints and a clean end."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float32

from sparsek_jax import nn
from sparsek_jax.data import Corpus, prepare, train_iterator, validation_batches
from sparsek_jax.data.lanes import LaneValidation, lane_iterator
from sparsek_jax.training import sharding
from sparsek_jax.training.checkpoint import Checkpoints
from sparsek_jax.training.config import ConfigError, decoder_config, mesh_shape, validate_config
from sparsek_jax.training.flops import peak_flops, train_flops
from sparsek_jax.training.initial import initial_params
from sparsek_jax.training.lock import lock
from sparsek_jax.training.loss import LOSS_FIELDS, hidden_states, token_loss
from sparsek_jax.training.metrics import MetricsWriter, StepTimer, progress_line, show
from sparsek_jax.training.optimizer import learning_rate_schedule, make_optimizer
from sparsek_jax.training.parameters import ModelDefinition, define, is_scorer, split
from sparsek_jax.training.recurrence import no_past, resumed_states
from sparsek_jax.training.signals import stop_signals
from sparsek_jax.training.workdir import (
    check_same_corpus,
    check_same_run,
    check_same_tokenizer,
    check_start,
    save_run,
)


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
      model: The decoder with its last weights, on the run's mesh.
      corpus: What it was trained on.
      step: Steps taken since the run began.
      finished: False if a signal ended it early.
    """

    model: nn.Decoder
    corpus: Corpus
    step: int
    finished: bool


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> TrainResult:
    """Trains until `train.steps`, resuming from the newest good checkpoint of `workdir`.

    Args:
      config: All fields of `default_config`.
      workdir: The run's directory; docs/architecture.md says what it holds.

    Returns:
      The model and how it ended. On SIGTERM or SIGINT it checkpoints and returns early.

    Raises:
      ConfigError: A field is impossible, or contradicts the run that `workdir` holds, or another
        process trains there.
      CheckpointError: `workdir` has checkpoints, but none is intact.
      TrainingDivergedError: `train.max_bad_steps` steps in a row were not finite.
    """
    workdir = Path(workdir)
    validate_config(config, jax.device_count(), jax.process_count())
    check_same_run(config, workdir)
    is_new = not (workdir / "config.json").exists()
    if config.init_from and is_new:
        check_start(config.init_from)
    try:
        corpus = prepare(config.data)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.init_from and is_new:
        check_same_tokenizer(config, corpus, config.init_from)
    model_config = decoder_config(config, corpus.tokenizer.vocab_size)
    definition = define(lambda: nn.Decoder(model_config, rngs=nnx.Rngs(config.seed)))

    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"workdir={str(workdir)!r}: {error.strerror}; expected a directory to write to"
        ) from error
    with lock(workdir):
        # Another trainer may have begun the run, and ended, since it was looked at.
        check_same_run(config, workdir)
        check_same_corpus(corpus, workdir)
        return _train(config, workdir, corpus, model_config, definition)


def _train(config, workdir, corpus, model_config, definition):
    """Trains in a directory that nobody else trains in."""
    log_run(config, corpus, definition)
    mesh = sharding.make_mesh(mesh_shape(config, jax.device_count()))
    optimizer = make_optimizer(config)
    processes = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "batch_size": config.train.batch_size // jax.process_count(),
    }
    iterate, hold_out = (
        (lane_iterator, LaneValidation)
        if config.train.recurrent
        else (train_iterator, validation_batches)
    )
    iterator = iterate(corpus, config.data, seed=config.seed, **processes)
    held_out = hold_out(corpus, config.data, **processes)

    init = functools.partial(_init, config, model_config, optimizer)
    state_shape = jax.eval_shape(init)
    shardings = sharding.tree_shardings(state_shape, mesh)
    if config.train.recurrent:
        rows = NamedSharding(mesh, sharding.ROWS)
        shardings["past"] = jax.tree.map(lambda _: rows, state_shape["past"])
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state_shape, shardings
    )
    # Whatever ends the run, the checkpoint that is being written gets finished.
    with contextlib.closing(Checkpoints(workdir, keep=config.train.keep)) as checkpoints:
        restored = checkpoints.restore(abstract, iterator)
        if restored is None:
            step, state = 0, jax.jit(init, out_shardings=shardings)()
            if config.init_from:
                state["params"], start = initial_params(
                    config.init_from,
                    model_config,
                    state["params"],
                    mesh,
                    vocab_size=corpus.tokenizer.vocab_size,
                )
                print(
                    f"starting from the weights of step {start} of {config.init_from}", flush=True
                )
        else:
            step, state = restored
            if step > config.train.steps:
                raise ConfigError(
                    f"train.steps={config.train.steps}, but the run in workdir={str(workdir)!r} "
                    f"is already at step {step}; expected at least that"
                )
            print(f"resuming from step {step} of {workdir}", flush=True)
        if jax.process_index() == 0:
            save_run(workdir, config, corpus)
        run = _Run(config, workdir, corpus, definition, mesh, optimizer, shardings)
        signals = (signal.SIGTERM, signal.SIGINT)
        with stop_signals(signals, every=config.train.log_every) as stop:
            state, step = run.loop(state, step, iterator, held_out, checkpoints, stop)
    model = definition.merge(state["params"])
    return TrainResult(model, corpus, step, finished=step == config.train.steps)


def train_step(
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    loss_chunk: int,
    rows: NamedSharding,
    state: dict,
    batch: dict[str, Array],
) -> tuple[dict, dict[str, Float32[Array, ""]]]:
    """One update; leaves everything as it was if the loss or the gradient is not finite.

    Args:
      definition: Of the model.
      optimizer: Of the parameters.
      config: The run's configuration.
      loss_chunk: Positions per row whose logits exist at a time.
      rows: How rows are spread over the devices.
      state: Parameters and optimizer state; where rows go on from the rows before, also their
        past.
      batch: Fields of a batch, `[B, T]`.

    Returns:
      The new state and scalar metrics. Loss is the mean of nats over unmasked targets.
    """
    pieces = config.optimizer.accumulate
    num_targets = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)

    def loss(params, piece):
        """This piece's share of the batch's loss, so that pieces add up to it exactly."""
        model = definition.merge(params)
        token, past = _loss(model, *piece, config, loss_chunk, rows)
        mask = piece[1]["loss_mask"]
        mean_nats = jnp.sum(token.nats * mask) / num_targets
        penalty = jnp.sum(token.log_z**2 * mask) / num_targets
        return mean_nats + config.optimizer.z_loss * penalty, (mean_nats, past)

    gradient = jax.value_and_grad(loss, has_aux=True)
    whole = (state.get("past"), batch)
    if pieces == 1:
        (_, (mean_nats, past)), gradients = gradient(state["params"], whole)
    else:

        def add(total, piece):
            (_, (mean_nats, past)), gradients = gradient(state["params"], piece)
            return jax.tree.map(jnp.add, total, (mean_nats, gradients)), past

        # Row i goes to piece i modulo their number, so every piece stays spread over the devices.
        split_rows = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0), whole
        )
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state["params"]))
        (mean_nats, gradients), past = jax.lax.scan(add, zero, split_rows)
        past = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), past)

    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(mean_nats) & jnp.isfinite(norm)
    inner, counters = state["optimizer"]["inner"], state["optimizer"]["counters"]
    updates, new_inner = optimizer.update(gradients, inner, state["params"])
    updated = (optax.apply_updates(state["params"], updates), new_inner)
    params, inner = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, (state["params"], inner)
    )
    bad = 1 - finite.astype(jnp.int32)
    counters = {
        "skipped": counters["skipped"] + bad,
        "bad_in_row": (counters["bad_in_row"] + 1) * bad,
        "updates": counters["updates"] + 1 - bad,
    }
    update = counters["updates"] - 1 + bad
    metrics = {
        "loss": mean_nats,
        "gradient_norm": norm,
        "learning_rate": learning_rate_schedule(config)(update),
        "targets": num_targets,
        "skipped_steps": counters["skipped"],
        "bad_in_row": counters["bad_in_row"],
    }
    if config.optimizer.scorer_learning_rate or config.optimizer.freeze_steps:
        schedule = learning_rate_schedule(config, scorers=True)
        metrics["scorer_learning_rate"] = schedule(update)
    new_state = {"params": params, "optimizer": {"inner": inner, "counters": counters}}
    if config.train.recurrent:
        # The past of a step that is left out ends before the next rows begin: it does not count.
        new_state["past"] = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), past, state["past"]
        )
    return new_state, metrics


def _loss(model, past, batch, config, loss_chunk, rows):
    if past is None:
        hidden = hidden_states(model, batch, packing=config.data.packing, sharding=rows)
    else:
        past, hidden, _ = resumed_states(model, past, batch, sharding=rows)
    loss = token_loss(model.output_table, hidden, batch["targets"], chunk_size=loss_chunk)
    return loss, past


def _init(config, model_config, optimizer):
    model = nn.Decoder(model_config, rngs=nnx.Rngs(config.seed))
    _, params = split(model)
    counters = {name: jnp.int32(0) for name in ("skipped", "bad_in_row", "updates")}
    state = {
        "params": params,
        "optimizer": {"inner": optimizer.init(params), "counters": counters},
    }
    if config.train.recurrent:
        row_length = config.data.seq_len if config.train.recurrent_gradient else None
        state["past"] = no_past(model, config.train.batch_size, row_length)
    return state


class _Run:
    """The loop and what stays the same during it."""

    def __init__(self, config, workdir, corpus, definition, mesh, optimizer, shardings):
        self.config, self.workdir, self.corpus = config, workdir, corpus
        self.rows = NamedSharding(mesh, sharding.ROWS)
        row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
        rows_per_device = config.train.batch_size // row_devices
        step_rows_per_device = rows_per_device // config.optimizer.accumulate
        loss_chunk, step_loss_chunk = (
            max(1, config.train.loss_chunk // n) for n in (rows_per_device, step_rows_per_device)
        )
        self.step = jax.jit(
            functools.partial(
                train_step, definition, optimizer, config, step_loss_chunk, self.rows
            ),
            donate_argnums=0,
            # Left to the compiler, a small parameter may come back split another way than it went
            # in, and the next step would be compiled anew.
            out_shardings=(shardings, None),
        )
        self.evaluate = jax.jit(functools.partial(_sums, definition, config, loss_chunk, self.rows))
        self.no_past = jax.jit(
            functools.partial(_no_past, definition, config), out_shardings=self.rows
        )
        self.model_config = decoder_config(config, corpus.tokenizer.vocab_size)
        # The peaks that are known are those of bfloat16.
        is_bfloat16 = config.model.dtype == "bfloat16"
        peak = peak_flops(jax.devices()[0].device_kind) if is_bfloat16 else None
        # Each process counts the FLOPs of its own rows.
        self.peak = peak * jax.local_device_count() if peak else None

    def loop(self, state, step, iterator, held_out, checkpoints, stop):
        """Runs to the last step or to a signal; returns the state and the step reached."""
        if jax.process_index():
            return self._loop(state, step, iterator, held_out, checkpoints, stop, None)
        with contextlib.closing(MetricsWriter(self.workdir, first_step=step + 1)) as writer:
            return self._loop(state, step, iterator, held_out, checkpoints, stop, writer)

    def _loop(self, state, step, iterator, held_out, checkpoints, stop, writer):
        config = self.config.train
        log = _Log(self, writer)
        pending = None
        while step < config.steps and not stop(step):
            batch = next(iterator)
            state, metrics = self.step(state, self._to_devices(batch))
            step += 1
            # The device works on this step while the host waits for the one before.
            if pending:
                log.arrived(*pending)
            pending = (step, metrics, batch)
            if checkpoints.seal():
                log.timer.pause()
            at_end = step == config.steps
            validates = at_end or (config.eval_every and step % config.eval_every == 0)
            saves = at_end or step % config.checkpoint_every == 0
            if validates or saves:
                # A full queue makes dispatch itself wait, so that metrics read behind a dispatch
                # come later than these: the time between the two is not one step's.
                log.timer.pause()
                log.arrived(*pending)
                pending = None
            if validates:
                log.validation(step, *self._validate(state["params"], held_out))
            if saves:
                checkpoints.save(step, state, iterator)
                log.timer.pause()
        if pending:
            log.arrived(*pending)
        if step < config.steps:
            checkpoints.save(step, state, iterator)
            checkpoints.wait()
            print(
                f"\nstopped at step {step} of {config.steps} by {stop.name}; checkpoint saved in "
                f"{self.workdir}. The same command resumes from there.",
                flush=True,
            )
        return state, step

    def _to_devices(self, batch):
        shape = (self.config.train.batch_size, self.config.data.seq_len)
        return {
            name: jax.make_array_from_process_local_data(self.rows, batch[name], shape)
            for name in LOSS_FIELDS
        }

    def _validate(self, params, held_out):
        """Mean nats and accuracy of held-out tokens over `train.eval_batches` batches."""
        limit = self.config.train.eval_batches or len(held_out)
        sums, past = [], self.no_past(params)
        for batch in itertools.islice(held_out, limit):
            batch_sums, past = self.evaluate(params, past, self._to_devices(batch))
            sums.append(batch_sums)
        nats, right, count = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
        return float(nats / count), float(right / count)


def _no_past(definition, config, params):
    if not config.train.recurrent:
        return None
    return no_past(definition.merge(params), config.train.batch_size)


def _sums(definition, config, loss_chunk, rows, params, past, batch):
    loss, past = _loss(definition.merge(params), past, batch, config, loss_chunk, rows)
    sums = (jnp.sum(x * batch["loss_mask"]) for x in (loss.nats, loss.likeliest))
    return (*sums, jnp.sum(batch["loss_mask"])), past


class _Log:
    """Turns the metrics of steps, as they arrive, into lines and files."""

    def __init__(self, run: _Run, writer: MetricsWriter | None):
        self._run, self._writer = run, writer
        self.timer = StepTimer()
        self._first = True
        self._losses: list[float] = []
        self._flops: list[float] = []

    def arrived(self, step, metrics, batch):
        """Waits for the metrics of a step and reports them."""
        config = self._run.config.train
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        # The first step's time is its compilation.
        if self._first:
            self._first = False
            self.timer.pause()
        self.timer.step_finished()
        bad_in_row = metrics.pop("bad_in_row")
        targets = metrics.pop("targets")
        if bad_in_row:
            self._bad_step(step, metrics, bad_in_row, batch["document_ids"])
        else:
            self._losses.append(metrics["loss"])
        if self._run.peak:
            self._flops.append(train_flops(self._run.model_config, batch["positions"]))
        if self._writer is None or not (step % config.log_every == 0 or step == config.steps):
            return
        seconds = self.timer.read()
        scalars = dict(metrics)
        if math.isfinite(seconds):
            scalars |= {"seconds_per_step": seconds, "tokens_per_second": targets / seconds}
            if self._run.peak:
                scalars["mfu"] = np.mean(self._flops).item() / seconds / self._run.peak
        self._writer.write(step, scalars)
        shown = dict(scalars)
        if self._losses:
            shown["loss"] = sum(self._losses) / len(self._losses)
        self._losses.clear()
        self._flops.clear()
        show(progress_line(step, config.steps, shown, seconds), last=step == config.steps)

    def validation(self, step, nats, accuracy):
        """Reports the held-out loss of a step, and how often the likeliest token was right."""
        self.timer.pause()
        if self._writer:
            scalars = {
                "validation_loss": nats,
                "validation_perplexity": math.exp(min(nats, 700)),
                "validation_accuracy": accuracy,
            }
            self._writer.write(step, scalars)
            show(
                f"step {step} | held-out loss {nats:.4f} | perplexity "
                f"{scalars['validation_perplexity']:.2f} | accuracy {accuracy:.1%}",
                last=True,
            )

    def _bad_step(self, step, metrics, bad_in_row, document_ids):
        run = self._run
        ids = sorted({int(i) for i in np.unique(document_ids) if i >= 0})
        record = {
            "step": step,
            "loss": str(metrics["loss"]),
            "gradient_norm": str(metrics["gradient_norm"]),
            "documents": {i: run.corpus.document_name(i, "train") for i in ids},
        }
        path = run.workdir / f"bad_batches.{jax.process_index()}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        logging.warning(
            "step %d skipped: loss %s, gradient norm %s (%d in a row; documents in %s)",
            step,
            metrics["loss"],
            metrics["gradient_norm"],
            bad_in_row,
            path,
        )
        if bad_in_row >= run.config.train.max_bad_steps:
            raise TrainingDivergedError(
                f"{int(bad_in_row)} steps in a row up to step {step} had a non-finite loss or "
                f"gradient (train.max_bad_steps={run.config.train.max_bad_steps}); their documents "
                f"are listed in {path}. The last checkpoint is untouched"
            )


def log_run(config: ml_collections.ConfigDict, corpus: Corpus, definition: ModelDefinition) -> None:
    """Prints versions, devices, data, parameter counts and the full configuration."""
    if jax.process_index():
        return
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    devices = jax.devices()
    sizes = {name: math.prod(x.shape) for name, x in definition.abstract.items()}
    scorer = sum(size for name, size in sizes.items() if is_scorer(name))
    print(f"Python {platform.python_version()}, {versions}")
    print(f"{len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)")
    print(f"data: {corpus.description}: {corpus.extent}")
    print(f"parameters: {sum(sizes.values()):,}, of which scoring network {scorer:,}")
    print(config, flush=True)
