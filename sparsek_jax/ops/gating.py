"""What gates act on: the arithmetic of a (query, key) pair that all implementations share.

Let a be the scaled logit, m the gate and v the value. A query's output is `sum(weight * v)`, and

    "soft"          weight = m exp(m a) / sum(exp(m a))     the paper's: m multiplies key and value
    "soft_values"   weight = m exp(a) / sum(exp(a))
    "soft_weights"  weight = m exp(a) / sum(m exp(a))       a gate near zero is as good as no key

Of all three the exponential over the sum is called the probability. "straight_through" is "soft"
with gates of one in the forward pass and in its derivatives, and the soft gate's gradient.
"""

from typing import Any, Literal, get_args

from jaxtyping import Array, Float

Gating = Literal["soft", "straight_through", "soft_values", "soft_weights"]
GATINGS: tuple[str, ...] = get_args(Gating)


def check_gating(gating: Any) -> None:
    """Raises unless there is a gating of that name."""
    if gating not in GATINGS:
        raise ValueError(f"gating={gating!r} is unknown; expected one of {list(GATINGS)}")


def is_soft(gating: Gating) -> bool:
    """Whether gates differ from one in the forward pass."""
    return gating != "straight_through"


def gates_sum(gating: Gating) -> bool:
    """Whether gates act on the sum that weights are divided by."""
    return gating == "soft_weights"


def least_gate(gating: Gating) -> float:
    """What selected keys' gates are at least, however they round.

    They are positive, and those of a query may all round to zero where scores share a large offset:
    the sum that weights are divided by must not.
    """
    return 2.0**-24 if gates_sum(gating) else 0.0


def times(x: Float[Array, "..."], gate: Float[Array, "..."] | None) -> Float[Array, "..."]:
    """The product with a gate; None is a gate of one."""
    return x if gate is None else x * gate


def gated_logits(
    gating: Gating, logits: Float[Array, "..."], gate: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    """What is exponentiated."""
    return times(logits, gate) if gating in ("soft", "straight_through") else logits


def cotangents(
    gating: Gating,
    probability: Float[Array, "..."],
    gate: Float[Array, "..."] | None,
    logits: Float[Array, "..."],
    d_weight: Float[Array, "..."],
    delta: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Derivatives of the output, times its cotangent, by logit and by gate.

    Args:
      gating: As in `sparsek_attention`.
      probability: As above.
      gate: m; None: one.
      logits: a.
      d_weight: Product of value and output's cotangent.
      delta: Product of output and output's cotangent.
    """
    if gating == "soft_weights":
        d_gate = probability * (d_weight - delta)
        return times(d_gate, gate), d_gate
    d_gated = probability * (times(d_weight, gate) - delta)
    d_gate = probability * d_weight
    if gating == "soft_values":
        # A NaN shows in the scores' gradient too.
        return d_gated, d_gate + 0.0 * d_gated
    return times(d_gated, gate), d_gate + d_gated * logits
