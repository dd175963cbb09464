"""The model class that the harness calls. Needs the package `lm_eval`."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sparsek_jax.evaluation.harness.likelihood import Continuation, ContinuationScorer
from sparsek_jax.evaluation.harness.loading import load_for_harness
from sparsek_jax.evaluation.harness.writing import write, writing_settings
from sparsek_jax.generation.engine import Engine, NonFiniteLogitsError
from sparsek_jax.training.config import ConfigError

# The harness shows what is logged below its own name only.
_logger = logging.getLogger("lm_eval.models.sparsek")


class SparseKLM(TemplateLM):
    """A run, or an imported model, for the lm-evaluation-harness.

    Every text begins a document, so the model reads bos first, and a text without context is
    conditioned on bos alone. How contexts and continuations are tokenized is the harness's rule.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        step: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **attention: Any,
    ):
        """Loads the model; compiles nothing yet.

        Args:
          workdir: The run's directory.
          step: The checkpoint; None for the newest that is intact.
          max_length: Most tokens that the model reads of a text. Of longer contexts the first
            tokens are dropped, and longer documents are read in pieces. None: there is no limit.
          max_gen_toks: Most tokens to write where a task does not say it.
          seed: Decides what is drawn where a task asks for sampling.
          batch_size: Texts in a batch (the harness's `--batch_size`).
          max_batch_size: Of the harness, ignored: sizes are not searched for.
          device: Of the harness, whose default names a GPU; ignored. JAX uses what it finds, or
            what the environment variable JAX_PLATFORMS names.
          **attention: As of `load_for_harness`: kind, num_selected, sliding_window and so on.

        Raises:
          ConfigError: An argument is impossible, or the run does not have what is needed.
          FileNotFoundError: The directory holds no run or no checkpoint.
          CheckpointError: Checkpoints exist but none is intact.
        """
        super().__init__()
        del max_batch_size, device
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r}; expected an integer of at least 1")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length={max_length!r}; expected at least 1")
        loaded = load_for_harness(str(workdir), attention, step=step)
        self._batch_size = int(batch_size)
        self._max_length, self._max_gen_toks = max_length, max_gen_toks
        self._seed, self._trained_length = seed, loaded.trained_length
        self._tokenizer = loaded.run.tokenizer
        self._scorer = ContinuationScorer(loaded.run.model, batch_size=self._batch_size)
        self._engine = Engine(loaded.run.model, loaded.run.tokenizer)
        _logger.info("step %d of %s", loaded.run.step, workdir)
        for note in loaded.notes:
            _logger.warning("%s", note)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a document: what a text without context is conditioned on."""
        return self._tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, with bos unless `add_special_tokens` is false."""
        del kwargs
        bos = [] if add_special_tokens is False else [self._tokenizer.bos_id]
        return [*bos, *self._tokenizer.encode(string).tolist()]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, each conditioned on bos; see `LM`."""
        texts = [request.args[0] for request in requests]
        owners, windows = [], []
        for owner, text in enumerate(texts):
            ids = self.tok_encode(text, add_special_tokens=False)
            length = self._max_length or max(len(ids), 1)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, length, 1):
                owners.append(owner)
                windows.append(Continuation(*make_disjoint_window(window)))
        if len(windows) > len(texts):
            _logger.warning(
                "max_length=%s: %d texts are read in %d pieces",
                self._max_length,
                len(texts),
                len(windows),
            )
        totals, missing = [0.0] * len(texts), collections.Counter(owners)
        for i, (nats, _) in self._scored(windows, disable_tqdm):
            owner = owners[i]
            totals[owner] += nats
            missing[owner] -= 1
            if not missing[owner]:
                key = (texts[owner],)
                self.cache_hook.add_partial("loglikelihood_rolling", key, totals[owner])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context; see `LM`."""
        prompts, settings = [], []
        for context, generation in (request.args for request in requests):
            prompts.append(self.tok_encode(context))
            normalised = normalize_gen_kwargs(generation, self._max_gen_toks)
            settings.append(_refused(writing_settings, normalised, seed=self._seed))
        if self._max_length is not None:
            limits = [self._max_length - own.max_tokens for own in settings]
            if min(limits, default=1) < 1:
                raise ConfigError(
                    f"max_length={self._max_length}; expected more than max_gen_toks="
                    f"{max(own.max_tokens for own in settings)}"
                )
            self._log_truncation(map(len, prompts), limits)
            prompts = [ids[-limit:] for ids, limit in zip(prompts, limits, strict=True)]
        self._log_length(len(ids) + s.max_tokens for ids, s in zip(prompts, settings, strict=True))
        texts = [""] * len(prompts)
        written = write(self._engine, prompts, settings, batch_size=self._batch_size)
        for i, text in self._shown(written, "Writing", len(prompts), disable_tqdm):
            texts[i] = text
            self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        continuations = [_refused(Continuation, *pair) for _, *pair in requests]
        if self._max_length is not None:
            lengths = [continuation.num_inputs for continuation in continuations]
            self._log_truncation(lengths, [self._max_length] * len(lengths))
            continuations = [_refused(c.truncated, self._max_length) for c in continuations]
        results = [(0.0, True)] * len(requests)
        for i, result in self._scored(continuations, disable_tqdm):
            results[i] = result
            self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return results

    def _scored(
        self, continuations: Sequence[Continuation], disable_tqdm: bool
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        self._log_length(continuation.num_inputs for continuation in continuations)
        likelihoods = self._scorer.score(continuations)
        for i, likelihood in self._shown(likelihoods, "Scoring", len(continuations), disable_tqdm):
            yield i, (likelihood.nats, likelihood.is_greedy)

    def _shown(self, results: Iterator, what: str, total: int, disable_tqdm: bool) -> Iterator:
        """Results with a progress bar."""
        try:
            yield from tqdm(results, desc=what, total=total, disable=disable_tqdm)
        except NonFiniteLogitsError as error:
            raise ConfigError(str(error)) from error

    def _log_truncation(self, lengths, limits):
        excess = [length - most for length, most in zip(lengths, limits, strict=True)]
        if longer := [tokens for tokens in excess if tokens > 0]:
            _logger.warning(
                "max_length=%d: of %d of %d contexts the first tokens are dropped, %d at most",
                self._max_length,
                len(longer),
                len(excess),
                max(longer),
            )

    def _log_length(self, lengths):
        longest = max(lengths, default=0)
        if self._trained_length is not None and longest > self._trained_length:
            _logger.warning(
                "texts have up to %d tokens; the run was trained on %d (max_length sets a limit)",
                longest,
                self._trained_length,
            )


def _refused(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The result; what is refused is a mistake of the user's, in a task or an argument."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise ConfigError(str(error)) from error
