"""SparseK attention: the public function, its argument checks and the choice of implementation."""

import functools
import logging
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from sparsek_jax.ops.checks import check_array, is_finite_number
from sparsek_jax.ops.gating import Gating, check_gating
from sparsek_jax.ops.mosaic_gpu import sparsek_attention_mosaic_gpu, unsupported
from sparsek_jax.ops.reference import sparsek_attention_reference
from sparsek_jax.ops.selection import causal_selection, check_selection_arguments
from sparsek_jax.ops.tracing import computed_once
from sparsek_jax.ops.xla import sparsek_attention_xla

Implementation = Literal["reference", "xla", "mosaic_gpu"]

_log = logging.getLogger(__name__)


def _with_nan_for_infinity(attend):
    """An infinite score has no finite threshold: as loud as a NaN in every implementation."""

    @functools.wraps(attend)
    def run(query, key, value, scores, **settings):
        scores = computed_once(jnp.where(jnp.isinf(scores), jnp.nan, scores))
        return attend(query, key, value, scores, **settings)

    return run


_IMPLEMENTATIONS = {
    "reference": _with_nan_for_infinity(sparsek_attention_reference),
    "xla": _with_nan_for_infinity(sparsek_attention_xla),
    "mosaic_gpu": sparsek_attention_mosaic_gpu,  # which sees no difference
}


def sparsek_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    scores: Float[Array, "B T K"] | Float[Array, "B T 1"],
    *,
    num_selected: int,
    sliding_window: int = 0,
    gating: Gating = "soft",
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
    return_until: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Int32[Array, "B T S"]]:
    """Causal attention over a sliding window and k keys that a learned score selects.

    SparseK attention, arXiv 2406.16747.

    One softmax runs over both. The pool of query t is every key `j <= t - w` of its document
    (`j <= t` without a window). Of these it keeps the k first in the order (score descending, index
    ascending), all of them while there are no more than k. A selected key's logit and value are
    multiplied by its gate, the SparseK projection of the pool's scores. Keys of the window,
    `t - w < j <= t`, are not gated. While no pool exceeds k this is dense causal attention.

    Differentiable in query, key, value and scores (reverse mode).

    Args:
      query: `[B, T, N, H]`, N a multiple of K; float32 or bfloat16 (float16 works too).
      key: `[B, T, K, H]`, dtype of query.
      value: `[B, T, K, H]`, dtype of query.
      scores: Importance of every key, `[B, T, K]` or, shared by all KV heads, `[B, T, 1]`. Should
        be float32.
      num_selected: k, at least 1; may exceed T.
      sliding_window: w, at least 0; may exceed T.
      gating: "soft"; "straight_through": gates are 1 in the forward pass and have the soft gate's
        gradient. Not of the paper: "soft_values", gates multiply values alone, and "soft_weights",
        they multiply the softmax's weights before these are normalised, so that a key goes as its
        gate goes to zero.
      scale: Factor on the logits; 1 / sqrt(H) by default.
      segment_ids: Optional integer ids of packed documents. A document is a maximal run of equal
        ids; none sees another.
      implementation: "xla" (chunked, memory linear in T, for every device), "mosaic_gpu" (kernels
        for NVIDIA Hopper GPUs: bfloat16 or float16, H at most 128; split over several devices only
        inside `shard_map`), "reference" (dense, for checking), or None for the best one that JAX's
        default device and the call allow.
      return_until: Also return which query drops each key.

    Returns:
      The attention output, shape and dtype of query. Where a query's pool contains a NaN or
      infinite score, NaN. With `return_until` also, int32 and of the shape of scores, the first
      query that does not attend to each key any more, the end of its document if there is none. Of
      a key that is still attended to when a NaN or infinite score enters the pool, this may be any
      query from there on.

    Raises:
      TypeError: An array has the wrong dtype, or is no array, or `num_selected` or
        `sliding_window` is not an int.
      ValueError: A shape or a value does not fit, or no implementation has that name.
      NotImplementedError: The named implementation does not support the call. Inside of a jit the
        device is not known: there it is JAX that says so, when it compiles.
    """
    check_attention_arguments(query, key, value, scores, scale)
    check_gating(gating)
    check_selection_arguments(scores, num_selected, sliding_window, segment_ids)
    check_implementation(implementation)
    name = _best(query) if implementation is None else implementation
    at_once = not any(isinstance(x, jax.core.Tracer) for x in (query, key, value, scores))
    if name == "mosaic_gpu" and at_once and (reason := unsupported(query) or no_kernels(query)):
        raise NotImplementedError(f"implementation={name!r}: {reason}")
    if query.size == 0:
        if not return_until:
            return query
        selection = causal_selection(
            scores,
            num_selected=num_selected,
            sliding_window=sliding_window,
            segment_ids=segment_ids,
        )
        return query, selection.lifetimes.until
    length = query.shape[1]
    return _attention(
        query,
        key,
        value,
        scores,
        segment_ids,
        implementation=name,
        num_selected=min(num_selected, length),
        sliding_window=min(sliding_window, length),
        gating=gating,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        return_until=return_until,
    )


def no_kernels(query: Float[Array, "B T N H"] | jax.ShapeDtypeStruct) -> str | None:
    """Why "mosaic_gpu" cannot run with such a query, or None.

    Args:
      query: An array, whose device counts, or else its like, for JAX's default device.
    """
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(query, jax.Array) and not isinstance(query, jax.core.Tracer):
        device = next(iter(query.devices()))
    platform = device if isinstance(device, str) else device.platform
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        return f"no kernels for {platform} {capability or ''}".rstrip()
    return unsupported(query)


def _best(query) -> Implementation:
    manual = jax.sharding.get_abstract_mesh()
    whole = jax.device_count() == 1 or (
        manual.axis_names and set(manual.manual_axes) == set(manual.axis_names)
    )
    reason = no_kernels(query)
    if reason is None and not whole:
        reason = "the kernels run on several devices only inside shard_map over all mesh axes"
    if reason is None:
        return "mosaic_gpu"
    _say_once(reason)
    return "xla"


@functools.cache
def _say_once(reason: str) -> None:
    _log.info("sparsek_attention uses implementation='xla': %s", reason)


# Compiled as one, a call outside of any jit takes a fraction of what its operations would.
@functools.partial(
    jax.jit,
    static_argnames=(
        "implementation",
        "num_selected",
        "sliding_window",
        "gating",
        "scale",
        "return_until",
    ),
)
def _attention(query, key, value, scores, segment_ids, *, implementation, return_until, **settings):
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    attend = _IMPLEMENTATIONS[implementation]
    out, until = attend(query, key, value, scores, segment_ids=segment_ids, **settings)
    return (out, until) if return_until else out


def check_implementation(implementation: Any) -> None:
    """Raises unless there is an implementation of that name, or it is None."""
    names = sorted(_IMPLEMENTATIONS)
    if implementation == "mosaic_tpu":
        raise NotImplementedError(
            f"implementation={implementation!r} has no kernel in this version; expected one of "
            f"{names} or None"
        )
    if implementation is not None and implementation not in names:
        raise ValueError(f"implementation={implementation!r} is unknown; expected {names} or None")


def check_attention_arguments(query: Any, key: Any, value: Any, scores: Any, scale: Any) -> None:
    """Raises the errors of `sparsek_attention` about its arrays and their scale."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_array(name, array, jnp.floating)
        if array.ndim != 4:
            raise ValueError(f"{name} must have shape [B, T, heads, H], got shape {array.shape}")
        if array.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {array.dtype}, expected query's {query.dtype}")
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    expected = (batch, length, num_kv_heads, head_dim)
    for name, array in (("key", key), ("value", value)):
        if array.shape != expected:
            raise ValueError(
                f"{name} has shape {array.shape}, expected [B, T, K, H] = {expected} to fit "
                f"query of shape {query.shape}"
            )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_heads} heads, expected a multiple of the {num_kv_heads} heads of key"
        )
    check_array("scores", scores, jnp.floating)
    if scores.shape not in ((batch, length, num_kv_heads), (batch, length, 1)):
        raise ValueError(
            f"scores has shape {scores.shape}, expected {(batch, length, num_kv_heads)} or "
            f"{(batch, length, 1)}"
        )
    if scale is not None and not is_finite_number(scale):
        raise ValueError(f"scale={scale!r} must be a finite float or None, known while tracing")
