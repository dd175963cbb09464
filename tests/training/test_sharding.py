"""What the compiled step of a sharded run computes where, on eight simulated devices."""

import re
import subprocess
import sys

import pytest

from tests.training.helpers import ROOT, environment

SCRIPT = """
import functools, sys
from pathlib import Path
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from sparsek_jax import nn
from sparsek_jax.training import sharding, trainer
from sparsek_jax.training.config import decoder_config
from sparsek_jax.training.parameters import define
from tests.training.test_step import make_config, make_optimizer



def compiled(mesh, layers):
    config = make_config()
    config.attention.implementation = "xla"
    config.model.update(d_model=48, mlp_dim=80, scan_layers=layers == "scan")
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, map(int, mesh.split("x")))))
    rows = NamedSharding(mesh, sharding.ROWS)
    model_config = decoder_config(config, 264)
    definition = define(lambda: nn.Decoder(model_config, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(config)
    shapes = jax.eval_shape(functools.partial(trainer._init, config, model_config, optimizer))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )
    batch = {
        name: jax.ShapeDtypeStruct(
            (16, 24), jnp.float32 if name == "loss_mask" else jnp.int32, sharding=rows
        )
        for name in trainer.LOSS_FIELDS
    }
    step = functools.partial(trainer.train_step, definition, optimizer, config, 24, rows)
    return jax.jit(step).lower(state, batch).compile().as_text()


for mesh in ("1x8x1", "2x2x2"):
    for layers in ("scan", "separate"):
        Path(sys.argv[1], f"{mesh} {layers}").write_text(compiled(mesh, layers))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Directory of the compiled steps' texts; one process starts, and traces the operator, once."""
    directory = tmp_path_factory.mktemp("programs")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory)],
        cwd=ROOT,
        env=environment(devices=8) | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return directory


@pytest.mark.parametrize("layers", ["scan", "separate"])
@pytest.mark.parametrize("mesh", ["1x8x1", "2x2x2"])
def test_no_device_holds_the_activations_of_another_ones_rows(programs, mesh, layers):
    program = (programs / f"{mesh} {layers}").read_text()
    rows, fsdp = {"1x8x1": (2, 8), "2x2x2": (4, 2)}[mesh]
    assert f"f32[{rows},24,48]" in program
    # Only the embedding, whose width is split, is looked up for all rows: a slice of the width.
    widths = re.findall(r"f32\[(?:16,24|384)[\d,]*?,(\d+)\]", program)
    assert max(map(int, widths), default=0) <= 48 // fsdp
