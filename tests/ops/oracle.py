"""The numerical truth: float64, one query at a time, written from the definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def document_starts(segment_ids, length):
    """First position of every position's document: a maximal run of equal ids."""
    starts = np.zeros(length, int)
    for t in range(1, length):
        same = segment_ids is None or segment_ids[t] == segment_ids[t - 1]
        starts[t] = starts[t - 1] if same else t
    return starts


def pool(t, start, window):
    """Positions of the keys in the pool of query t."""
    return np.arange(start, max(t - window + 1, start))


def tau(z, k):
    """The tau with sum(clip(z - tau, 0, 1)) = k; -inf if z has at most k entries."""
    z = np.sort(np.asarray(z, np.float64))
    if len(z) <= k:
        return -np.inf
    sums = np.concatenate([[0.0], np.cumsum(z)])

    def sum_above(x):
        """Sum of relu(z - x)."""
        first = np.searchsorted(z, x, side="right")
        return (sums[-1] - sums[first]) - (len(z) - first) * x

    # The sum is linear between these, and falls from len(z) to zero.
    knots = np.sort(np.concatenate([z, z - 1.0]))
    mass = sum_above(knots) - sum_above(knots + 1.0)
    upper = min(np.searchsorted(-mass, -k, side="left"), len(knots) - 1)
    while mass[upper] >= k:
        upper += 1
    lower = upper - 1
    fall = mass[lower] - mass[upper]
    return knots[lower] + (mass[lower] - k) / fall * (knots[upper] - knots[lower])


def sparsek(z, k):
    """The projection of the float64 vector z."""
    z = np.asarray(z, np.float64)
    return np.clip(z - tau(z, k), 0.0, 1.0)


def selected(scores, positions, k):
    """The k of `positions` first in the order (score descending, index ascending)."""
    return positions[np.lexsort((positions, -scores[positions]))][:k]


def attention(query, key, value, scores, *, k, window, gating, segment_ids=None):
    """SparseK attention of float64 JAX arrays; differentiable by autodiff.

    Which keys are selected and which gates are interior comes from numpy, query by query. Given
    these, a gate is an explicit function of the scores.
    """
    batch, length = query.shape[:2]
    num_kv_heads = key.shape[2]
    scores = jnp.broadcast_to(scores, (batch, length, num_kv_heads))
    plain = np.asarray(jax.lax.stop_gradient(scores))
    rows = []
    for b in range(batch):
        ids = None if segment_ids is None else np.asarray(segment_ids[b])
        starts = document_starts(ids, length)
        rows += [_selection(plain[b, :, h], starts, k, window) for h in range(num_kv_heads)]
    selection = [
        np.stack(x).reshape(batch, num_kv_heads, *x[0].shape) for x in zip(*rows, strict=True)
    ]
    return _attend(query, key, value, scores, *selection, gating)


# Operation by operation, a shape would take twice as long to compile, and every call to dispatch.
@functools.partial(jax.jit, static_argnums=8)
def _attend(query, key, value, scores, attended, ones, interior, constant, gating):
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    u = jnp.swapaxes(scores, 1, 2)
    count = jnp.maximum(interior.sum(-1), 1)
    threshold = (jnp.einsum("bkts,bks->bkt", interior.astype(u.dtype), u) + constant) / count
    gate = jnp.where(interior, u[:, :, None] - threshold[..., None], 1.0 * ones)
    if gating == "straight_through":
        gate = gate + jax.lax.stop_gradient(1.0 - gate)
    gate, attended = gate[:, :, None], attended[:, :, None]
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key) / np.sqrt(head_dim)
    if gating in ("soft", "straight_through"):
        logits = logits * gate
    weights = jax.nn.softmax(jnp.where(attended, logits, -jnp.inf), axis=-1)
    weights *= jnp.where(attended, gate, 0.0)
    if gating == "soft_weights":
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value)
    return out.reshape(query.shape)


def _selection(u, starts, k, window):
    """Of one row with scores u, `[T, T]`: keys attended to, gates of one, interior gates.

    And `[T]`, how many gates are one, less k. Gates are meaningless outside the mask.
    """
    length = len(u)
    mask, ones, interior = np.zeros((3, length, length), bool)
    constant = np.zeros(length)
    for t in range(length):
        mask[t, max(starts[t], t - window + 1) : t + 1] = True
        ones[t] = mask[t]
        positions = pool(t, starts[t], window)
        mask[t, selected(u, positions, k)] = True
        gates = u[positions] - tau(u[positions], k)
        # A gate at a corner of the projection, up to rounding, has the gradient of its clip: none.
        inner = (gates > 1e-9) & (gates < 1 - 1e-9)
        interior[t, positions[inner]] = True
        ones[t, positions[gates >= 1 - 1e-9]] = True
        constant[t] = np.sum(gates >= 1 - 1e-9) - k
    return mask, ones, interior, constant
