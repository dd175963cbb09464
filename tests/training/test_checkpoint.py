"""What happens to a run whose checkpoints cannot be written."""

import resource
import shutil
import subprocess
import time

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax.training.checkpoint import CheckpointError, Checkpoints
from tests.training.helpers import ROOT, command, environment, write_corpus


@pytest.fixture
def small_files():
    """No file of this process may grow above a megabyte, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_in_the_background_ends_the_run_and_leaves_no_trace(
    small_files, tmp_path
):
    iterator = iter(grain.MapDataset.range(4).to_iter_dataset())
    noise = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    state = {"params": {"noise": jnp.asarray(noise)}}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(4, state, iterator)
    while checkpoints._manager.is_saving_in_progress():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=r"cannot be written to .*None was before"):
        checkpoints.seal()
    checkpoints.close()
    assert not list(tmp_path.glob("manifests/*"))
    assert Checkpoints(tmp_path, keep=1).restore(state, iterator) is None


def test_a_save_that_cannot_begin_ends_the_process(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    workdir = tmp_path / "run"
    with subprocess.Popen(
        command(workdir, corpus, "train.steps=1000000", "train.checkpoint_every=20"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        next(line for line in process.stdout if line.startswith("step 2/"))
        shutil.rmtree(workdir / "checkpoints")
        (workdir / "checkpoints").write_text("")
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: a checkpoint cannot be written to ")
    assert "Not a directory" in errors.splitlines()[-1]
