"""Real runs of train.py in processes of their own, on a corpus of a few generated files."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
# Most of a tiny run is compilation, which runs of one program share.
_COMPILED = Path(tempfile.gettempdir()) / f"sparsek_jax_compiled_{os.getuid()}"


def write_corpus(directory):
    """Text files with some structure to learn."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        words = rng.integers(0, 50, 400)
        (directory / f"{i}.txt").write_text(" ".join(f"w{word}" for word in words))
    return directory


def command(workdir, corpus, *overrides):
    """Command line of a tiny run; later overrides win."""
    fields = {
        "data.glob": f"{corpus}/*.txt",
        "data.root": f"{corpus}/prepared",
        "data.max_documents": 0,
        "sample.length": 0,
        "train.eval_every": 0,
        "train.checkpoint_every": 1000,
    }
    fields |= dict(override.split("=", 1) for override in overrides)
    return [
        sys.executable,
        "train.py",
        "--config=configs/tiny_test.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def environment(devices=1):
    """Variables of a process with that many simulated CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(_COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {**os.environ, **cache, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def run(workdir, corpus, *overrides, devices=1):
    """Runs to the end and returns the finished process."""
    return subprocess.run(
        command(workdir, corpus, *overrides),
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        check=False,
    )


def start_two(workdir, corpus, *overrides):
    """Starts the two processes of a distributed run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *command(workdir, corpus, *overrides),
                "--distributed",
                f"--coordinator=localhost:{port}",
                "--num_processes=2",
                f"--process_id={i}",
            ],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def losses(workdir):
    """Training loss by step."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
