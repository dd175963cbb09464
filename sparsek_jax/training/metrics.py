"""What a run reports: a progress line, metrics.jsonl and tensorboard events."""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends scalars to `metrics.jsonl` and to tensorboard events in a run's directory."""

    def __init__(self, workdir: Path, *, first_step: int):
        """Opens the files; lines from `first_step` on, left by a killed run, are removed."""
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            kept = []
            for line in self._path.read_text(errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] < first_step:
                        kept.append(line + "\n")
                except (ValueError, TypeError, KeyError):
                    continue  # Half a line: the process was killed while writing it.
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, self._path)
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of a step to both; not a number is null in JSON."""
        clean = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        self._events.close()


class StepTimer:
    """Time per step, without compilation, validation and checkpoints."""

    def __init__(self):
        self._last = None
        self._elapsed = 0.0
        self._steps = 0
        self.mean = math.nan

    def step_finished(self) -> None:
        """Call when the metrics of a step have arrived."""
        now = time.perf_counter()
        if self._last is not None:
            self._elapsed += now - self._last
            self._steps += 1
        self._last = now

    def pause(self) -> None:
        """Leaves what happens until the next step's metrics out of the count."""
        self._last = None

    def read(self) -> float:
        """Mean seconds per step since the last reading; the last value if there were none."""
        if self._steps:
            self.mean = self._elapsed / self._steps
            self._elapsed, self._steps = 0.0, 0
        return self.mean


def peak_memory() -> tuple[str, int]:
    """Label and bytes of the largest memory use so far: the first device's, or the process's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return "device memory", stats["peak_bytes_in_use"]
    return "host memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def progress_line(step: int, num_steps: int, scalars: dict[str, float], seconds: float) -> str:
    """One line about a step; `seconds` per step give the time left."""
    label, memory = peak_memory()
    parts = [
        f"step {step}/{num_steps}",
        f"loss {scalars['loss']:.4f}",
        f"perplexity {math.exp(min(scalars['loss'], 700)):.2f}",
    ]
    if math.isfinite(seconds):
        left = int((num_steps - step) * seconds)
        parts += [
            f"{scalars['tokens_per_second']:,.0f} tokens/s",
            f"{seconds * 1e3:,.0f} ms/step",
            f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}",
        ]
    parts.append(f"peak {label} {memory / 2**30:.2f} GiB")
    if "mfu" in scalars:
        parts.append(f"MFU {100 * scalars['mfu']:.1f}%")
    if scalars["skipped_steps"]:
        parts.append(f"skipped {scalars['skipped_steps']:.0f}")
    return " | ".join(parts)


def show(line: str, *, last: bool = False) -> None:
    """Rewrites the line on a terminal; prints a new one elsewhere."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
    else:
        print(line, flush=True)
