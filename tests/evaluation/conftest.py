import contextlib
import io
import random
from types import SimpleNamespace

import pytest

from sparsek_jax.training.config import default_config
from sparsek_jax.training.trainer import train


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A trained run with eight query heads to spare: `config`, `workdir` and what `train` gave."""
    directory = tmp_path_factory.mktemp("run")
    text = directory / "text"
    text.mkdir()
    for index in range(12):
        letters = random.Random(index).choices("abcdefgh \n", k=150 + 10 * index)
        (text / f"{index:02d}.txt").write_text("".join(letters))
    config = default_config()
    config.data.glob = str(text / "*.txt")
    config.data.root = str(directory / "prepared")
    config.data.seq_len = 32
    config.data.validation_fraction = 0.3
    config.model.num_layers = 2
    config.model.d_model = 16
    config.model.mlp_dim = 16
    config.attention.num_heads = 2
    config.attention.num_kv_heads = 1
    config.attention.head_dim = 8
    config.attention.num_selected = 4
    config.attention.sliding_window = 3
    config.attention.implementation = "reference"  # which compiles faster
    config.optimizer.warmup_steps = 1
    config.train.steps = 2
    config.train.batch_size = 2
    config.train.eval_every = 0
    config.train.eval_batches = 1
    config.eval.batch_size = 4
    config.eval.position_buckets = 3
    workdir = directory / "workdir"
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(config, workdir)
    return SimpleNamespace(config=config, workdir=workdir, result=result)
