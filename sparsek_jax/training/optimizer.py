"""AdamW with warm-up, cosine decay and clipping."""

import ml_collections
import optax

from sparsek_jax.training.parameters import Params

_MATRICES = ("kernel", "embedding", "output")


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear warm-up, then a cosine to `optimizer.end_fraction` of the peak at the last step.

    The first update has the first nonzero value of the warm-up.
    """
    optimizer = config.optimizer
    return optax.warmup_cosine_decay_schedule(
        init_value=optimizer.learning_rate / (optimizer.warmup_steps + 1),
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=config.train.steps,
        end_value=optimizer.learning_rate * optimizer.end_fraction,
    )


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The optimizer of a run; weight decay acts on matrices only."""

    def is_matrix(params: Params) -> dict[str, bool]:
        return {name: name.rsplit(".", 1)[-1] in _MATRICES for name in params}

    optimizer = config.optimizer
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=is_matrix,
    )
    # Both have the same (empty) state, so that a run may resume with the other.
    no_clip = optimizer.clip_norm == 0
    clip = optax.identity() if no_clip else optax.clip_by_global_norm(optimizer.clip_norm)
    return optax.chain(clip, adamw)
