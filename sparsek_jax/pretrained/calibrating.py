"""A directory's weights with scorers that start from a text, in a new directory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sparsek_jax import nn
from sparsek_jax.data import Tokenizer
from sparsek_jax.nn.config import KINDS_WITH_PARAMETERS, has_scorer
from sparsek_jax.nn.scorer import SLOPE_UNIT
from sparsek_jax.pretrained.directories import check_new, staged, write_files
from sparsek_jax.pretrained.exporting import restore_on_host, tokenizer_files, trained_context
from sparsek_jax.pretrained.scorer_start import DEFAULT_SCALE, METHODS, Method, scorer_starts
from sparsek_jax.training.checkpoint import save_params
from sparsek_jax.training.config import ConfigError, decoder_config
from sparsek_jax.training.parameters import is_scorer, stack_layers, unstack_layers
from sparsek_jax.training.workdir import load_config, load_run_tokenizer, save_import


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What a calibration did.

    Attributes:
      step: That the weights are from.
      layers: Indices of those that got a scorer.
      num_tokens: That were read.
    """

    step: int
    layers: tuple[int, ...]
    num_tokens: int


def calibrate_model(
    workdir: str | os.PathLike,
    to: Path,
    texts: Sequence[Path],
    *,
    method: Method = "attention_mass",
    scale: float = DEFAULT_SCALE,
    timestep_norm: bool = False,
    learned_slope: bool = True,
    num_sinks: int = 4,
    kind: str | None = None,
    num_selected: int | None = None,
    sliding_window: int | None = None,
    gating: str | None = None,
    length: int = 2048,
    max_rows: int = 4,
) -> Calibrated:
    """Writes the newest weights of a run or import with new scorers; all other weights stay.

    Args:
      workdir: Directory of the run or import.
      to: Directory to make; it is like an import's.
      texts: UTF-8 files to read.
      method: One of `METHODS`.
      scale: Standard deviation of the scores over the text; with TimestepNorm, its gain.
      timestep_norm: Whether the new scorers have a TimestepNorm, whatever those of `workdir` have.
        It makes the first token's score 0, and so loses the token that many models attend to most
        unless that is a sink.
      learned_slope: Whether each head gets a rate at which it forgets. That lowers nats, but what
        stands far back and is needed only once is lost.
      num_sinks: First tokens of a document to select always.
      kind: Of every layer's attention; None: as in `workdir`. "sparsek" makes SparseK of what
        was trained with dense attention.
      num_selected: k; None: as in `workdir`.
      sliding_window: w; None: as in `workdir`.
      gating: As in `sparsek_attention`; None: as in `workdir`.
      length: Tokens in a row.
      max_rows: Most rows of one text, the first ones.

    Returns:
      What was done.

    Raises:
      FileNotFoundError: `workdir` holds no run or no checkpoint.
      OSError: A text cannot be read, or `to` not be written.
      ConfigError: No layer has a scorer, no text fills a row, a row is no longer than the window,
        or an argument is out of range.
      CheckpointError: Checkpoints exist but none is intact.
    """
    check_new("to", to)
    if method not in METHODS:
        raise ConfigError(f"--method={method!r}; expected one of {', '.join(METHODS)}")
    if not 0 < scale < float("inf"):
        raise ConfigError(f"--scale={scale}; expected a finite number above 0")
    if kind in KINDS_WITH_PARAMETERS:
        raise ConfigError(
            f"--kind={kind}; expected sparsek, or none: what {kind} has besides scorers would be "
            "missing"
        )
    config = load_config(workdir)
    tokenizer = load_run_tokenizer(workdir, config)
    source = decoder_config(config, tokenizer.vocab_size)
    if kind is not None:
        config.attention.kind, config.attention.pattern = kind, ()
    for name, chosen in (("num_selected", num_selected), ("sliding_window", sliding_window)):
        if chosen is not None:
            config.attention[name] = chosen
    config.attention.timestep_norm = timestep_norm
    config.attention.learned_slope = learned_slope
    config.attention.num_sinks = num_sinks
    config.attention.gating = gating or config.attention.gating
    config.init_from = ""  # The weights are here.
    # Checks the gating and the sinks. Slopes are chosen with these.
    aim = decoder_config(config, tokenizer.vocab_size)
    _check_attention(workdir, aim, length)
    tokens = calibration_rows(tokenizer, texts, length=length, max_rows=max_rows)
    files = tokenizer_files(workdir, config, tokenizer)
    context = trained_context(workdir, config)
    params, step = restore_on_host(workdir, source)
    params = unstack_layers({name: np.asarray(x) for name, x in params.items()}, source)
    params = {name: x for name, x in params.items() if not is_scorer(name)}
    scorers, layers = {}, []
    for layer, starts in scorer_starts(params, aim, tokens, methods=(method,), scale=scale):
        layers.append(layer)
        start = starts[method]
        prefix = f"layers.{layer}.attention.scorer"
        if learned_slope:
            scorers[f"{prefix}.head_slope"] = SLOPE_UNIT * start.slope
        scorers[f"{prefix}.kernel"] = start.kernel
        if timestep_norm:
            scorers[f"{prefix}.kernel"] = start.kernel / scale
            scorers[f"{prefix}.norm.gain"] = np.full(start.slope.shape, scale, np.float32)
    record = {
        "path": str(Path(workdir).absolute()),
        "step": step,
        "context_length": context,
        "calibration": {"method": method, "scale": scale, "texts": [str(path) for path in texts]},
    }
    with staged(to) as staging:
        tokenizer_path = write_files(staging / "tokenizer", files) / "tokenizer.json"
        save_import(staging, config, tokenizer=tokenizer_path, source=record)
        written = stack_layers(params | scorers, aim)
        save_params(staging, {name: jnp.asarray(x) for name, x in written.items()})
    return Calibrated(step=step, layers=tuple(layers), num_tokens=tokens.size)


def _check_attention(workdir: str | os.PathLike, config: nn.DecoderConfig, length: int) -> None:
    attention = config.attention
    if not any(has_scorer(attention.layer_kind(i)) for i in range(config.num_layers)):
        raise ConfigError(
            f"workdir={str(workdir)!r} has no layer of kind sparsek, and so no scorers; expected "
            "some (--kind=sparsek)"
        )
    if length <= attention.sliding_window:
        raise ConfigError(
            f"--length={length}; expected more than "
            f"attention.sliding_window={attention.sliding_window}, so that queries see keys beyond "
            "their window"
        )


def calibration_rows(
    tokenizer: Tokenizer, texts: Sequence[Path], *, length: int, max_rows: int
) -> Int[np.ndarray, "R T"]:
    """Cuts texts into rows; what does not fill one is left out.

    Args:
      tokenizer: That of the model.
      texts: UTF-8 files.
      length: T, tokens in a row.
      max_rows: Most rows of one text, the first ones.

    Raises:
      OSError: A file cannot be read.
      ConfigError: A file is not UTF-8, or none fills a row.
    """
    rows, found = [], []
    for path in texts:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--text={str(path)!r}: {error}; expected UTF-8 text") from error
        # A long text need not be tokenised whole: few tokens stand for 64 characters.
        ids = tokenizer.encode(text[: 64 * length * max_rows])
        found.append(f"{path} {len(ids)}")
        count = min(len(ids) // length, max_rows)
        rows.append(np.asarray(ids[: count * length]).reshape(count, length))
    tokens = np.concatenate(rows)
    if not len(tokens):
        raise ConfigError(
            f"--text holds too few tokens ({', '.join(found)}); expected at least "
            f"--length={length} in one file"
        )
    return tokens
