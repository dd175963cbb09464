"""AdamW with warm-up, cosine decay and clipping; scorers and layers may have their own rates."""

import ml_collections
import numpy as np
import optax
from absl import logging

from sparsek_jax.nn.config import has_scorer
from sparsek_jax.training.config import decoder_config
from sparsek_jax.training.parameters import Params, is_scorer, layers_of

_MATRICES = ("kernel", "embedding", "output")


def learning_rate_schedule(
    config: ml_collections.ConfigDict, *, scorers: bool = False
) -> optax.Schedule:
    """Linear warm-up, then a cosine to `optimizer.end_fraction` of the peak at the last step.

    The first update has the first nonzero value of the warm-up. While `optimizer.freeze_steps` hold
    everything but the scorers, the rate of the rest is 0; its warm-up comes after.

    Args:
      config: The run's configuration.
      scorers: Whether the rate is that of the scorers. Otherwise it is that of all other
        parameters, before `optimizer.layer_decay`.
    """
    if scorers:
        return _warmup_cosine(config, scale=_scorer_scale(config))
    frozen = _frozen_steps(config)
    schedule = _warmup_cosine(config, after=frozen)
    if not frozen:
        return schedule
    return optax.join_schedules([optax.constant_schedule(0.0), schedule], [frozen])


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The optimizer of a run; weight decay acts on matrices only.

    In the first `optimizer.freeze_steps` updates all but the scorers is as if it were not there:
    it has no weight decay, no moments, and no share in the norm that is clipped. A model without
    scorers is trained whole from the first step, so that each kind of attention sees as many tokens
    under one recipe.
    """
    optimizer = config.optimizer

    def adamw(after=0):
        return optax.adamw(
            _warmup_cosine(config, after=after),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask=_is_matrix,
        )

    # Both have the same (empty) state, so that a run may resume with the other.
    no_clip = optimizer.clip_norm == 0
    clip = optax.identity() if no_clip else optax.clip_by_global_norm(optimizer.clip_norm)
    return optax.chain(*_frozen_at_first(config, clip, adamw), *_own_rates(config))


def _frozen_at_first(config, clip, adamw):
    frozen = _frozen_steps(config)
    if not frozen:
        if config.optimizer.freeze_steps:
            logging.warning(
                "optimizer.freeze_steps=%d without effect: no layer has a scorer that could move "
                "alone",
                config.optimizer.freeze_steps,
            )
        return clip, adamw()

    def later(transform):
        return optax.transforms.conditionally_mask(transform, lambda step: step >= frozen)

    def group(params: Params) -> dict[str, str]:
        return {name: "scorers" if is_scorer(name) else "others" for name in params}

    def is_other(params: Params) -> dict[str, bool]:
        return {name: not is_scorer(name) for name in params}

    by_group = {"scorers": adamw(), "others": later(adamw(after=frozen))}
    moving = optax.masked(later(optax.identity()), is_other)
    return moving, clip, optax.multi_transform(by_group, group)


def _own_rates(config):
    """Nothing, or what scales updates by the rates that scorers and layers have of their own."""
    optimizer = config.optimizer
    scorer_scale = _scorer_scale(config)
    if scorer_scale == 1 and optimizer.layer_decay == 1:
        return ()
    model = decoder_config(config, config.model.vocab_size or 1)

    def scale(name, ndim):
        if is_scorer(name):
            return np.float32(scorer_scale)
        if name == "embedding":
            layers = np.array(-1)
        elif (layers := layers_of(name, model)) is None:
            return np.float32(1)
        scales = (optimizer.layer_decay ** (model.num_layers - 1 - layers)).astype(np.float32)
        return scales.reshape(scales.shape + (1,) * (ndim - scales.ndim))

    return (
        optax.stateless(
            lambda updates, _: {name: x * scale(name, x.ndim) for name, x in updates.items()}
        ),
    )


def _frozen_steps(config):
    attention = config.attention
    kinds = tuple(attention.pattern) or (attention.kind,)
    return config.optimizer.freeze_steps if any(map(has_scorer, kinds)) else 0


def _scorer_scale(config):
    optimizer = config.optimizer
    return (optimizer.scorer_learning_rate or optimizer.learning_rate) / optimizer.learning_rate


def _is_matrix(params: Params) -> dict[str, bool]:
    return {name: name.rsplit(".", 1)[-1] in _MATRICES for name in params}


def _warmup_cosine(config, *, after=0, scale=1):
    """The schedule of the steps that come after some."""
    optimizer = config.optimizer
    peak = scale * optimizer.learning_rate
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (optimizer.warmup_steps + 1),
        peak_value=peak,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=config.train.steps - after,
        end_value=peak * optimizer.end_fraction,
    )
