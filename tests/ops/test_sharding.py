"""The operator under `shard_map`, on eight simulated devices in a process of their own."""

import os
import subprocess
import sys

SCRIPT = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from tests.ops.test_attention import Case, make_inputs, run

mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
case = Case(kv_heads=4, group=2, head_dim=16, length=70, k=9, window=5)
for shared in (False, True):
    case = case._replace(shared=shared)
    inputs = make_inputs(case)
    by_head = P("data", None, "tensor")
    by_score = P("data") if shared else by_head
    sharded = jax.shard_map(
        lambda *arrays: run(*arrays, case=case, gating="soft", implementation="xla"),
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, by_score, by_head, P("data")),
        out_specs=(by_head, by_head, by_head, by_head, by_score),
    )
    expected = run(*inputs, case=case, gating="soft", implementation="xla")
    for x, y in zip(jax.jit(sharded)(*inputs), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
print("equal on", len(jax.devices()), "devices")
"""


def test_shard_map_over_batch_and_heads():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "equal on 8 devices" in result.stdout
