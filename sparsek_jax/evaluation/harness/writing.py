"""What a model writes after prompts, by the harness's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsek_jax.evaluation.harness.batching import batches, padded_width
from sparsek_jax.generation.engine import Engine
from sparsek_jax.generation.sampling import Sampling

# Settings of other backends that tasks spell out, with the only value that they may have here.
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "min_p": 0}


@dataclasses.dataclass(frozen=True)
class WritingSettings:
    """How text is written.

    Attributes:
      max_tokens: Most tokens.
      sampling: How they are chosen; batches add their number to its seed.
      stop: Strings before which a text ends.
    """

    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


def writing_settings(generation: Mapping[str, Any], *, seed: int) -> WritingSettings:
    """Reads what the harness's `normalize_gen_kwargs` makes of a task's `generation_kwargs`.

    Args:
      generation: "max_gen_toks", "until" and "do_sample", and perhaps "temperature", "top_k" (0 or
        -1 for all tokens) and "top_p". Without a temperature, the likeliest tokens are taken.
      seed: Decides what is drawn.

    Raises:
      ValueError: A setting is out of range, or one that would change the text is not known.
    """
    rest = dict(generation)
    max_tokens, until = rest.pop("max_gen_toks"), rest.pop("until")
    temperature = float(rest.pop("temperature", 0.0))
    if not rest.pop("do_sample"):
        temperature = 0.0
    top_k, top_p = rest.pop("top_k", None), rest.pop("top_p", None)
    for name, value in rest.items():
        if name not in _WITHOUT_EFFECT or value != _WITHOUT_EFFECT[name]:
            raise ValueError(
                f"generation_kwargs has {name}={value!r}; expected none but until, max_gen_toks, "
                "do_sample, temperature, top_k and top_p"
            )
    if max_tokens < 1:
        raise ValueError(f"max_gen_toks={max_tokens!r}; expected at least 1")
    sampling = Sampling(
        temperature=temperature,
        top_k=None if top_k in (0, -1) else top_k,
        top_p=top_p,
        seed=seed,
    )
    # An empty string, or none, stops nothing.
    return WritingSettings(max_tokens, sampling, tuple(filter(None, until)))


def write(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[WritingSettings],
    *,
    batch_size: int,
) -> Iterator[tuple[int, str]]:
    """Continues prompts, those with the same settings in batches of similar lengths.

    Args:
      engine: The model.
      prompts: Token ids, bos included, none empty.
      settings: Of every prompt.
      batch_size: Texts that are written together.

    Yields:
      The index of every prompt and its text, without the stop string.

    Raises:
      NonFiniteLogitsError: Logits are not finite.
    """
    groups: dict[WritingSettings, list[int]] = {}
    for index, own in enumerate(settings):
        groups.setdefault(own, []).append(index)
    number = 0
    for shared, members in groups.items():
        for batch in batches([len(prompts[i]) for i in members], batch_size):
            indices = [members[i] for i in batch]
            texts = _write_batch(engine, [prompts[i] for i in indices], shared, number, batch_size)
            yield from zip(indices, texts, strict=True)
            number += 1


def _write_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    settings: WritingSettings,
    number: int,
    batch_size: int,
) -> list[str]:
    # Of another number of rows, or with much other room, other programs would have to be compiled.
    rows = [*prompts, *[prompts[-1]] * (batch_size - len(prompts))]
    longest = max(map(len, rows))
    room = padded_width(longest + settings.max_tokens) - longest
    session = engine.start_tokens(rows, max_tokens=room)
    # What is drawn depends on row and position; the same prompt may stand there in another batch.
    sampling = settings.sampling
    sampling = dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**32)
    for _ in session.stream(max_tokens=settings.max_tokens, sampling=sampling, stop=settings.stop):
        pass
    return [completion.text for completion in session.completions[: len(prompts)]]
