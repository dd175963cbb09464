"""Programs run side by side, each with its output in a file, as studies of many runs need them."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Job:
    """Programs that run one after the other.

    Attributes:
      commands: With their arguments; what follows one that fails is not run.
      log: File for what they print.
      is_done: Whether they have run to their end.
    """

    commands: Sequence[Sequence[str]]
    log: pathlib.Path
    is_done: Callable[[], bool]


def program(
    script: str, config: str, workdir: pathlib.Path | str, fields: Mapping[str, object]
) -> list[str]:
    """A call of train.py or eval.py with some fields of the configuration."""
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, script, f"--config={config}", f"--workdir={workdir}", *overrides]


def last_measured(workdir: pathlib.Path, name: str) -> tuple[float, list[tuple[int, float]]] | None:
    """A metric of held-out rows when a run ended, and by step; None if it has not ended."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return None
    records = [json.loads(line) for line in path.read_text().splitlines()]
    curve = {record["step"]: record[name] for record in records if name in record}
    steps = json.loads((workdir / "config.json").read_text())["train"]["steps"]
    return (curve[steps], sorted(curve.items())) if steps in curve else None


def run_jobs(jobs: Sequence[Job], at_a_time: int, gpus: Sequence[str] = ()) -> bool:
    """Runs jobs that are not done, in order, says which fail, and returns whether none did.

    Args:
      jobs: What to run.
      at_a_time: How many at a time; if there are `gpus`, on each.
      gpus: GPUs, of which every job sees one, or several as in "0,1"; none: it sees all devices.
    """
    places = queue.SimpleQueue()
    for _ in range(at_a_time):
        for gpu in gpus or [None]:
            places.put(gpu)

    def run(job):
        if job.is_done():
            return True
        gpu = places.get()
        try:
            return _run(job, gpu, shares=at_a_time > 1)
        finally:
            places.put(gpu)

    with concurrent.futures.ThreadPoolExecutor(places.qsize()) as pool:
        return all(list(pool.map(run, jobs)))


def _run(job, gpu, shares):
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if shares:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        for command in job.commands:
            result = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
            if result.returncode:
                print(f"{' '.join(command)}: exit status {result.returncode}, see {job.log}")
                return False
    return True
