"""The weights that a run starts from where they are not new: those of a run or of an import."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from sparsek_jax import nn
from sparsek_jax.training.checkpoint import restore_params
from sparsek_jax.training.config import ConfigError, decoder_config
from sparsek_jax.training.parameters import (
    Params,
    define,
    is_of_kind,
    is_scorer,
    stack_layers,
    unstack_layers,
)
from sparsek_jax.training.sharding import tree_shardings
from sparsek_jax.training.workdir import load_config

# Fields that may differ without a warning: attention to choose, and how things are computed.
_FREE = {
    *("attention", "kind", "pattern", "num_selected", "sliding_window", "block_size"),
    *("gating", "score_scale", "implementation", "remat", "scan_layers", "dtype"),
}


def initial_params(
    directory: str | os.PathLike,
    config: nn.DecoderConfig,
    params: Params,
    mesh: Mesh,
    *,
    vocab_size: int,
) -> tuple[Params, int]:
    """Loads the newest weights of a directory into another decoder.

    Its layers may be stacked where those of the directory are not, and the other way round. Its
    attention may be another: scorers, and what else other kinds of attention lack, stay as they are
    where the directory has none, and scorers without use are dropped. A warning names what else
    makes the decoder another function of its weights.

    Args:
      directory: Of the run or import.
      config: Of the decoder.
      params: Its new parameters, on the mesh.
      mesh: Where they are.
      vocab_size: Of the tokenizer, which the directory's must equal.

    Returns:
      The parameters, each where the new one was, and the step they are from.

    Raises:
      FileNotFoundError: The directory holds no checkpoint.
      CheckpointError: It has checkpoints, but none is intact.
      ConfigError: The directory's decoder has other layers or other shapes.
    """
    source = decoder_config(load_config(directory), vocab_size)
    definition = define(lambda: nn.Decoder(source, rngs=nnx.Rngs(0)))
    shardings = tree_shardings(definition.abstract, mesh)
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in definition.abstract.items()
    }
    needed = _layers(params, config)
    _check(directory, _layers(abstract, source), needed)
    changes = _changes("model", source, config) + _changes(
        "attention", source.attention, config.attention
    )
    if changes:
        logging.warning("not as in init_from=%r: %s", str(directory), ", ".join(changes))
    try:
        restored, step = restore_params(directory, abstract)
    except ValueError as error:
        # Its config.json was changed by hand.
        raise ConfigError(f"init_from={str(directory)!r}: {error}") from error
    if _stacking(source) == _stacking(config):
        return {name: restored.get(name, x) for name, x in params.items()}, step
    of_kind = {name: x for name, x in params.items() if is_of_kind(name)}

    def rearranged(restored, of_kind):
        given = unstack_layers(of_kind, config) | unstack_layers(restored, source)
        return stack_layers({name: given[name] for name in needed}, config)

    # Under a jit, as the arrays may be spread over processes.
    shardings = {name: x.sharding for name, x in params.items()}
    return jax.jit(rearranged, out_shardings=shardings)(restored, of_kind), step


def _changes(section, source, config):
    """Fields that differ, with the value that the weights were trained with in brackets."""
    return [
        f"{section}.{field.name}={new!r} ({old!r})"
        for field in dataclasses.fields(config)
        if field.name not in _FREE
        and (new := getattr(config, field.name)) != (old := getattr(source, field.name))
    ]


def _layers(params, config):
    """Shapes of the parameters of every layer by itself."""
    return jax.eval_shape(functools.partial(unstack_layers, config=config), dict(params))


def _stacking(config):
    return config.scan_layers and config.period


def _check(directory, given, needed):
    for name, expected in needed.items():
        if name not in given and not is_of_kind(name):
            raise ConfigError(
                f"init_from={str(directory)!r} has no parameter {name} of shape {expected.shape}; "
                "expected it, as every kind of attention has it"
            )
        if name in given and given[name].shape != expected.shape:
            raise ConfigError(
                f"init_from={str(directory)!r} has the parameter {name} in shape "
                f"{given[name].shape}; expected {expected.shape}"
            )
    for name, found in given.items():
        if name not in needed and not is_scorer(name):
            raise ConfigError(
                f"init_from={str(directory)!r} has a parameter {name} of shape {found.shape}; "
                "expected none, as it belongs to no scorer"
            )
