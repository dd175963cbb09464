"""Attention over masks, as one would write it first."""

import jax
import jax.numpy as jnp
import numpy as np


def masked(query, key, value, mask):
    """Softmax attention over a mask `[B, K or N, T, T]`."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    logits = jnp.where(jnp.repeat(mask, query.shape[2] // mask.shape[1], axis=1), logits, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)


def with_gradients(attend, query, key, value, weight):
    out, vjp = jax.vjp(attend, query, key, value)
    return [out, *vjp(weight.astype(out.dtype))]


def assert_close(actual, exact):
    """Relative errors of at most 1e-5, of several arrays."""
    for ours, truth in zip(*jax.tree.map(np.asarray, (actual, exact)), strict=True):
        assert truth.dtype == np.float64
        assert np.linalg.norm(ours - truth) <= 1e-5 * np.linalg.norm(truth)
