"""The operator under `shard_map`, on eight simulated devices in a process of their own."""

import os
import subprocess
import sys

SCRIPT = """
import functools
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
    expected = run(*inputs, case=case, gating="soft", implementation="reference")
    for x, y in zip(jax.jit(sharded)(*inputs), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)

# Gradients of what is replicated where something else is split; outside of jit, too.
from flax import nnx
from sparsek_jax import causal_selection, sparsek
from sparsek_jax.nn.norms import TimestepNorm

inputs = make_inputs(case._replace(shared=False))
query, scores, segment_ids = inputs[0], inputs[3], inputs[5]


def check(function, in_specs, *arrays):
    sharded = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=P("data"))

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(f, *arrays):
        out, vjp = jax.vjp(f, *arrays)
        return out, vjp(2 * out)

    out, gradients = with_gradients(sharded, *arrays)
    expected, of_whole = with_gradients(function, *arrays)
    for x in (out, sharded(*arrays)):
        np.testing.assert_allclose(x, expected, atol=2e-5)
    for x, y in zip(gradients, of_whole, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def tau(scores, segment_ids=segment_ids):
    selection = causal_selection(
        scores, num_selected=9, sliding_window=5, segment_ids=segment_ids
    )
    return jax.numpy.maximum(selection.tau, -9.0)


check(lambda z, k: sparsek(z, k, axis=1), (P("data"), P()), scores, np.float32(4.5))
check(lambda scores: tau(scores, None), (P("data"),), scores)
# Of so many keys some are pruned, of those that rise not enough for the first room.
rise = np.array([0, 0.1])[:, None, None] * np.arange(128)[:, None]
longer = jax.random.normal(jax.random.key(0), (2, 128, 1)) + rise
few = lambda z: jax.numpy.maximum(causal_selection(z, num_selected=2).tau, -9.0)
check(few, (P("data"),), longer)
one_row = scores[:1]
by_row = jax.shard_map(tau, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
ids = segment_ids[:2]
loss = lambda f: jax.jit(jax.grad(lambda u: (f(u, ids) ** 2).sum()))(one_row)
whole = lambda u, ids: tau(jax.numpy.broadcast_to(u, (2, *u.shape[1:])), ids)
np.testing.assert_allclose(loss(by_row), loss(whole), rtol=2e-5, atol=2e-5)
# Its gradient in a `shard_map` crashes Shardy (jaxlib 0.11.2), as an associative scan of products
# does.
norm = TimestepNorm(scores.shape[-1])
start = jax.numpy.zeros(scores.shape[:2], int)
by_row = jax.shard_map(norm, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
for transform in (lambda f: f, jax.jit):
    np.testing.assert_allclose(transform(by_row)(scores, start), norm(scores, start), atol=2e-6)
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
