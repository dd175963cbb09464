"""Layers of several devices, on four simulated ones in a process of their own."""

import subprocess
import sys

import pytest

from tests.training.helpers import ROOT, environment

SCRIPT = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sparsek_jax.nn import AttentionConfig
from sparsek_jax.nn.alternatives import LAYERS

CONFIG = AttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=16, num_selected=9, sliding_window=5,
    timestep_norm=False, pattern=("sparsek_linear",),
)
x = jax.random.normal(jax.random.key(0), (4, 70, 32))
ids = jnp.asarray(np.arange(70) // 40 * np.ones((4, 1)), jnp.int32)


def gradients(config, sharding, segment_ids, dtype="float32"):
    def layer(kind):
        return LAYERS[kind](config, 32, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

    graphdef, params = nnx.split(nnx.List(map(layer, config.pattern)))

    def loss(params, x):
        if sharding is not None:
            x = jax.lax.with_sharding_constraint(x, sharding)
        layers = nnx.merge(graphdef, params)
        outs = [layer(x, segment_ids=segment_ids, sharding=sharding) for layer in layers]
        return sum(jnp.sum(jnp.sin(out.astype(jnp.float32))) for out in outs)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), params


# Heads are split where the other axes' sizes divide their number, scores where there are several.
SELECTIONS = {
    "sparsek_linear": ((2, 2), {}, ids),
    "shared scores": ((1, 4), {"shared_scores": True}, None),
    "unlearned": (
        (2, 2),
        {"pattern": ("sinks", "random", "key_norm"), "implementation": "reference"},
        ids,
    ),
}
if sys.argv[1] in SELECTIONS:
    sizes, changes, segment_ids = SELECTIONS[sys.argv[1]]
    mesh = jax.make_mesh(sizes, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    config = dataclasses.replace(CONFIG, **changes)
    split, params = gradients(config, NamedSharding(mesh, P("data")), segment_ids)
    whole, _ = gradients(config, None, segment_ids)
    for a, b in zip(*(jax.tree.leaves(f(params, x)) for f in (split, whole)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    config = dataclasses.replace(config, implementation="mosaic_gpu")
    split, params = gradients(config, NamedSharding(mesh, P("data")), segment_ids, "bfloat16")
    lowered = split.trace(params, x).lower(lowering_platforms=("cuda",)).as_text()
    # Layers whose arrays have the same shapes share their kernels: random and key_norm do.
    assert lowered.count("mosaic_gpu_v2") >= 5 * min(2, len(config.pattern))
else:
    kinds = ("moba", "nsa", "bigbird", "lsh")
    config = dataclasses.replace(
        CONFIG, num_selected=12, sliding_window=6, block_size=3, pattern=kinds
    )
    whole, params = gradients(config, None, ids)
    expected = jax.tree.leaves(whole(params, x))
    for sizes in ((2, 2), (1, 4)):
        mesh = jax.make_mesh(sizes, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        split, params = gradients(config, NamedSharding(mesh, P("data")), ids)
        for a, b in zip(jax.tree.leaves(split(params, x)), expected, strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
print("equal on", len(jax.devices()), "devices")
"""


@pytest.mark.parametrize("layers", ["sparsek_linear", "shared scores", "unlearned", "others"])
def test_devices_attend_with_their_rows_and_heads(layers):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, layers],
        cwd=ROOT,
        env=environment(devices=4) | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "equal on 4 devices" in result.stdout
