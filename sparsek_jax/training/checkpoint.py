"""Checkpoints that are verified before they are trusted.

A run's directory holds `checkpoints/<step>/` (written by orbax, atomically) and
`manifests/<step>.json` with the SHA-256 of every file of that step, because orbax restores a file
with a flipped bit without notice. A step that fails its manifest is moved to `corrupt/`.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from grain.checkpoint import CheckpointRestore, CheckpointSave
from jax.experimental import multihost_utils

from sparsek_jax import nn
from sparsek_jax.training.parameters import Params, define, is_scorer
from sparsek_jax.training.workdir import write_json

# Bytes. What is compressed is held until a file of it is full, whose size is large by default.
_SAVED_PIECE = 2**22


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be trusted."""


class Checkpoints:
    """Checkpoints of one run: the trainer's state and the data iterator of a step together."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        """Opens or creates the run's checkpoints, of which the newest `keep` are kept."""
        self._workdir = Path(workdir).absolute()
        self._manifests = self._workdir / "manifests"
        self._is_writer = jax.process_index() == 0
        # Created in the background, a directory that cannot be would be waited for: for minutes, by
        # the main thread, which hears no signal meanwhile.
        in_order = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, async_options=in_order
        )
        self._manager = ocp.CheckpointManager(self._workdir / "checkpoints", options=options)
        self._unsealed: list[int] = []

    def save(self, step: int, state: dict[str, Any], iterator: grain.DatasetIterator) -> None:
        """Starts writing a step in the background; does nothing if it is already there.

        Args:
          step: Its number.
          state: Trees of arrays by name, "params" among them; every one gets a directory.
          iterator: Of the data.

        Raises:
          CheckpointError: This step, or the one started before, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        trees = {name: ocp.args.StandardSave(tree) for name, tree in state.items()}
        args = ocp.args.Composite(**trees, data=CheckpointSave(iterator))
        with self._write_errors():
            self._manager.save(step, args=args)
        self._unsealed.append(step)

    def seal(self) -> bool:
        """Writes the manifests of the steps whose files are complete.

        Returns:
          Whether there were any.

        Raises:
          CheckpointError: One could not be written in the background.
        """
        ready = bool(self._unsealed) and not self._manager.is_saving_in_progress()
        if ready:
            # Does not wait any more, but raises what went wrong; the manager still lists that step.
            with self._write_errors():
                self._manager.wait_until_finished()
            if self._is_writer:
                self._manifests.mkdir(exist_ok=True)
                kept = set(self._manager.all_steps())
                for step in kept.intersection(self._unsealed):
                    digests = _digests(_step_directory(self._workdir, step))
                    write_json(self._manifest(step), digests)
                for path in self._manifests.glob("*.json"):
                    if int(path.stem) not in kept:
                        path.unlink()
            self._unsealed.clear()
        return ready

    def wait(self) -> None:
        """Returns when every started checkpoint is on disk and sealed.

        Raises:
          CheckpointError: One cannot be written.
        """
        with self._write_errors():
            self._manager.wait_until_finished()
        self.seal()

    def close(self) -> None:
        """Waits, then releases the manager."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and tensorstore raise many types.
            self._unsealed.clear()
            kept = sorted(self._manager.all_steps())
            raise CheckpointError(
                f"a checkpoint cannot be written to {self._workdir / 'checkpoints'}: {error}. "
                + (f"The same command resumes from step {kept[-1]}" if kept else "None was before")
            ) from error

    def restore(
        self, state: dict[str, Any], iterator: grain.DatasetIterator
    ) -> tuple[int, dict[str, Any]] | None:
        """Restores the newest step that is intact, and advances `iterator` to it.

        Args:
          state: What was saved, with abstract arrays that have shardings.
          iterator: Of the same data section; changed in place.

        Returns:
          Step and state, or None if the run has no checkpoint.

        Raises:
          CheckpointError: Checkpoints exist, or were there once, but none is intact.
        """

        def read(step):
            trees = {name: ocp.args.StandardRestore(tree) for name, tree in state.items()}
            args = ocp.args.Composite(**trees, data=CheckpointRestore(iterator))
            restored = self._manager.restore(step, args=args)
            return {name: restored[name] for name in state}

        found = _newest_intact(self._workdir, read)
        if found is None:
            lost = sorted(int(path.stem) for path in self._manifests.glob("*.json"))
            if lost:
                raise CheckpointError(
                    f"workdir={str(self._workdir)!r} had checkpoints of the steps {lost}, but "
                    "holds none; put them back, or start again in another --workdir"
                )
            return None
        step, restored = found
        if not self._manifest(step).exists():
            self._unsealed.append(step)
        self._quarantine_after(step)
        return step, restored

    def _manifest(self, step: int) -> Path:
        return _manifest(self._workdir, step)

    def _quarantine_after(self, step: int) -> None:
        """Moves the broken steps out of the way of the ones that will be written anew."""
        for broken in sorted(self._manager.all_steps()):
            if broken > step and self._is_writer:
                target = self._workdir / "corrupt" / str(broken)
                target.parent.mkdir(exist_ok=True)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(_step_directory(self._workdir, broken), target)
                self._manifest(broken).unlink(missing_ok=True)
                logging.warning("moved the damaged checkpoint of step %d to %s", broken, target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are moved")
        self._manager.reload()


def save_params(workdir: str | os.PathLike, params: Params) -> None:
    """Writes parameters alone, as step 0 of a directory that has no checkpoints yet.

    Little more memory is taken than the parameters have; `restore_params` reads them.

    Args:
      workdir: The directory; it exists.
      params: On one device.

    Raises:
      CheckpointError: They cannot be written.
    """
    workdir = Path(workdir).absolute()
    sizes = [x.nbytes for x in params.values()]
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=_gigabytes_in_flight(sizes))
    path = _step_directory(workdir, 0) / "params"
    pieces = ocp.SaveArgs(chunk_byte_size=_SAVED_PIECE)
    args = ocp.args.PyTreeSave(
        params,
        save_args=dict.fromkeys(params, pieces),
        ocdbt_target_data_file_size=2 * _SAVED_PIECE,
    )
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args)
    except Exception as error:  # Orbax and tensorstore raise many types.
        raise CheckpointError(f"the parameters cannot be written to {path}: {error}") from error
    _manifest(workdir, 0).parent.mkdir()
    write_json(_manifest(workdir, 0), _digests(_step_directory(workdir, 0)))


def restore_model(
    workdir: str | os.PathLike, config: nn.DecoderConfig, *, step: int | None = None
) -> tuple[nn.Decoder, int]:
    """Loads a run's weights into a decoder, which may use another attention.

    Scorers that the decoder has no use for are dropped.

    Args:
      workdir: The run's directory.
      config: The decoder to build.
      step: The checkpoint; None for the newest that is intact.

    Returns:
      The decoder on one device, and the step its weights are from.

    Raises:
      FileNotFoundError: There is no checkpoint, or not that step.
      CheckpointError: Checkpoints exist but none is intact.
      ValueError: The decoder needs a parameter that the checkpoint lacks or has in another shape,
        or has no place for one that belongs to no scorer.
    """
    definition = define(lambda: nn.Decoder(config, rngs=nnx.Rngs(0)))
    params, step = restore_params(workdir, definition.abstract, step=step)
    return definition.merge(params), step


def restore_params(
    workdir: str | os.PathLike,
    abstract: dict[str, jax.ShapeDtypeStruct],
    *,
    step: int | None = None,
) -> tuple[Params, int]:
    """Loads a run's parameters, and drops scorers that are not asked for.

    Args:
      workdir: The run's directory.
      abstract: The parameters by name, each with its sharding; without one it goes to one device.
      step: The checkpoint; None for the newest that is intact.

    Returns:
      The parameters, and the step they are from.

    Raises:
      FileNotFoundError: There is no checkpoint, or not that step.
      CheckpointError: Checkpoints exist but none is intact.
      ValueError: A parameter is not in the checkpoint or has another shape there, or one that is
        there and belongs to no scorer is not asked for.
    """
    workdir = Path(workdir).absolute()
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"workdir={str(workdir)!r} holds no checkpoint; train first: "
            f"python train.py --config=CONFIG --workdir={workdir}"
        )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if step is not None and step not in _steps(workdir):
        raise FileNotFoundError(
            f"step={step} is not in workdir={str(workdir)!r}; expected one of "
            f"{sorted(_steps(workdir))}"
        )

    def sharding(name, shape):
        # Read to be dropped, or to be refused by its shape.
        wanted = abstract.get(name)
        known = wanted is not None and wanted.shape == shape
        return (known and wanted.sharding) or device

    def read(step):
        path = _step_directory(workdir, step) / "params"
        # The checkpointer's own `metadata` warns that a part of a step has none of a whole one.
        saved = ocp.StandardCheckpointHandler().metadata(path)
        target = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(name, x.shape))
            for name, x in saved.items()
        }
        sizes = [math.prod(x.shape) * x.dtype.itemsize for x in target.values()]
        limit = _gigabytes_in_flight(sizes)
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=limit)
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(path, ocp.args.StandardRestore(target))

    found = _newest_intact(workdir, read, only=step)
    if found is None:
        raise FileNotFoundError(
            f"workdir={str(workdir)!r} holds no checkpoint; train first: "
            f"python train.py --config=CONFIG --workdir={workdir}"
        )
    step, saved = found
    for name, expected in abstract.items():
        if name not in saved:
            raise ValueError(
                f"parameter {name} is not in the checkpoint of step {step} in {workdir}; the "
                "attention asked for needs weights that this run did not train"
            )
        if saved[name].shape != expected.shape:
            raise ValueError(
                f"parameter {name} has shape {saved[name].shape} in the checkpoint of step "
                f"{step}; the model expects {expected.shape}"
            )
    for name in sorted(saved.keys() - abstract.keys()):
        if not is_scorer(name):
            raise ValueError(
                f"parameter {name} of the checkpoint of step {step} in {workdir} has no place in "
                "the model; expected the attention that it was trained with"
            )
    return {name: saved[name] for name in abstract}, step


def _gigabytes_in_flight(sizes: Sequence[int]) -> float:
    """What may be held twice while it is written or read, given the bytes of every array.

    An eighth, but no array may reach the limit.
    """
    return max(sum(sizes) / 8, 1.01 * max(sizes)) / 1e9


def _step_directory(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / str(step)


def _manifest(workdir: Path, step: int) -> Path:
    return workdir / "manifests" / f"{step}.json"


def _steps(workdir: Path) -> Sequence[int]:
    return ocp.utils.checkpoint_steps(workdir / "checkpoints")


def _newest_intact(
    workdir: Path, read: Callable[[int], Any], *, only: int | None = None
) -> tuple[int, Any] | None:
    """Reads the newest step whose files equal its manifest: `(step, read(step))` or None."""
    tried = set()
    while untried := {only} - tried if only is not None else set(_steps(workdir)) - tried:
        step = max(untried)
        tried.add(step)
        damage = _damage(workdir, step)
        if damage is None:
            try:
                return step, read(step)
            except Exception as error:  # Orbax and tensorstore raise many types.
                damage = _damage(workdir, step)
                if damage is None and _manifest(workdir, step).exists():
                    # Its files are as written: the caller's expectations are wrong, not the files.
                    raise
                damage = damage or f"it cannot be read ({error})"
        if not _step_directory(workdir, step).exists():
            # A training run that goes on at the same time has deleted it, and written a newer one.
            tried.remove(step)
            if only is not None:
                break
            continue
        logging.warning("the checkpoint of step %d in %s is damaged: %s", step, workdir, damage)
    if tried:
        raise CheckpointError(
            f"no checkpoint in workdir={str(workdir)!r} is intact; tried steps {sorted(tried)}. "
            "Start again in another --workdir"
        )
    return None


def _damage(workdir: Path, step: int) -> str | None:
    """What is wrong with the files of a step; None if nothing is, or if it was never sealed."""
    path = _manifest(workdir, step)
    if not path.exists():
        logging.warning("the checkpoint of step %d has no manifest: not verified", step)
        return None
    try:
        expected = json.loads(path.read_text())
    except ValueError:
        expected = None
    if not isinstance(expected, dict) or not expected:
        return f"its manifest {path} is damaged"
    try:
        actual = _digests(_step_directory(workdir, step))
    except OSError as error:
        return f"it cannot be read ({error})"
    changed = sorted(name for name in expected if actual.get(name) != expected[name])
    return f"{changed[0]} is missing or differs from what was written" if changed else None


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by relative path."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                name = path.relative_to(directory).as_posix()
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
