"""What generate.py does: prompts in, text out, and statistics when it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from sparsek_jax.generation.chat import Chat
from sparsek_jax.generation.engine import Engine, Session
from sparsek_jax.generation.explain import check_explainable, write_explanation
from sparsek_jax.generation.loading import LoadedRun, load_run
from sparsek_jax.generation.sampling import Sampling
from sparsek_jax.training.config import ConfigError
from sparsek_jax.training.signals import stop_signals

# Text appears about as often as this, in seconds.
_BLOCK_SECONDS = 0.1
_DEFAULT_ROOM = 8192
# What a shell makes of a program that SIGINT ends.
_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A command line.

    Attributes:
      workdir: A training run's directory.
      prompt: The prompt itself.
      prompt_file: File whose whole content is the prompt.
      prompts_file: File with a prompt on every line.
      interactive: Whether to answer line by line.
      max_tokens: Most tokens to generate, after every prompt or in every answer.
      sampling: How tokens are chosen.
      stop: Strings before which a text ends.
      max_length: Interactive, with layers that remember all tokens: most tokens of the whole
        conversation; None for 8192.
      explain: Directory for a page and a picture of what was remembered of the one text.

    Raises:
      ConfigError: A field is out of range or contradicts another; the message names the flag.
    """

    workdir: str
    prompt: str | None = None
    prompt_file: str | None = None
    prompts_file: str | None = None
    interactive: bool = False
    max_tokens: int = 256
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: Sequence[str] = ()
    max_length: int | None = None
    explain: str | None = None

    def __post_init__(self):
        sources = {name: getattr(self, name) for name in ("prompt", "prompt_file", "prompts_file")}
        given = [f"--{name}={value!r}" for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are both set; expected at most one of them")
        if self.prompt == "":
            raise ConfigError("--prompt='' is empty; expected some text to continue")
        if self.interactive and self.prompts_file is not None:
            raise ConfigError(
                f"--interactive with {given[0]}; expected at most one prompt, --prompt or "
                "--prompt_file"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"--max_tokens={self.max_tokens}; expected at least 1")
        if "" in self.stop:
            raise ConfigError("--stop='' is empty; expected a string that ends the text")
        if self.max_length is not None:
            if not self.interactive:
                raise ConfigError(
                    f"--max_length={self.max_length} without --interactive; expected only "
                    "--max_tokens, since the length is then known"
                )
            if self.max_length < 2:
                raise ConfigError(f"--max_length={self.max_length}; expected at least 2")
        if self.explain == "":
            raise ConfigError("--explain='' is empty; expected a directory")
        if self.explain is not None and self.prompts_file is not None:
            raise ConfigError(
                f"--explain={self.explain!r} with --prompts_file={self.prompts_file!r}; expected "
                "one text, with --prompt or --prompt_file"
            )


def generate(request: Request, *, stdin: TextIO, stdout: TextIO, stderr: TextIO) -> int:
    """Generates what is asked for.

    The text of one prompt goes to `stdout` while it is written, without the prompt; of a file of
    prompts, a JSON object a line with "prompt", "text", "tokens" and "end". Statistics, and what is
    for people only, go to `stderr`. SIGINT ends the text that is being written.

    Args:
      request: The command line.
      stdin: Holds the prompt if the command line has none, or the turns of the conversation.
      stdout: For text.
      stderr: For the rest.

    Returns:
      The exit status: 0, or 130 if SIGINT ended a text other than an answer.

    Raises:
      ConfigError: A prompt is missing, empty or unreadable, the run does not have what is needed,
        the conversation has no room left, the model's logits are not finite, or it selects nothing
        that could be explained.
      FileNotFoundError: The directory holds no run or no checkpoint.
      CheckpointError: Checkpoints exist but none is intact.
    """
    prompts = _prompts(request, stdin)
    run = load_run(request.workdir)
    engine = Engine(run.model, run.tokenizer)
    print(f"step {run.step} of {request.workdir}", file=stderr)
    try:
        if request.explain is not None:
            _check_explain(request, run)
        if request.interactive:
            session = Session(engine, 1, max_length=_room(request, engine))
            work = functools.partial(_converse, request, prompts, session, stdin, stdout, stderr)
        else:
            session = engine.start(prompts, max_tokens=request.max_tokens)
            write = _write_one if request.prompts_file is None else _write_all
            work = functools.partial(write, request, prompts, session, stdout)
        prompt_length = len(session.tokens[0])
        try:
            status = work()
        finally:
            print(session.statistics.report(engine.model_config), file=stderr)
            if num_lost := session.num_lost:
                print(
                    f"{num_lost:,} scores of dropped keys had no room in the cache: gates are "
                    "approximate (docs/generation.md)",
                    file=stderr,
                )
        if request.explain is not None and session.tokens[0]:
            paths = write_explanation(
                request.explain,
                run.model,
                run.tokenizer,
                session.tokens[0],
                title=f"{Path(request.workdir).absolute().name}, step {run.step}",
                # A conversation goes to and fro.
                prompt_length=None if request.interactive else prompt_length,
            )
            for path in paths:
                print(f"wrote {path}", file=stderr)
        return status
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_explain(request: Request, run: LoadedRun) -> None:
    """Finds out before anything is written, and not after."""
    try:
        check_explainable(run.model.config)
        Path(request.explain).mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise ConfigError(f"--explain={request.explain!r}: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"--explain={request.explain!r}: {error.strerror}; expected a directory to write to"
        ) from error


def _write_one(request, prompts, session, stdout) -> int:
    del prompts
    with stop_signals([signal.SIGINT]) as stop:
        for _, piece in _stream(request, session, stop):
            _show(piece, stdout)
    if stdout.isatty():
        _show("\n", stdout)
    return _INTERRUPTED if stop.name else 0


def _write_all(request, prompts, session, stdout) -> int:
    with stop_signals([signal.SIGINT]) as stop:
        for _ in _stream(request, session, stop):
            pass
    for prompt, completion in zip(prompts, session.completions, strict=True):
        record = {
            "prompt": prompt,
            "text": completion.text,
            "tokens": completion.num_tokens,
            "end": completion.reason,
        }
        _show(json.dumps(record, ensure_ascii=False) + "\n", stdout)
    return _INTERRUPTED if stop.name else 0


def _stream(request, session, stop) -> Iterator[tuple[int, str]]:
    return session.stream(
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        stop=request.stop,
        block_seconds=_BLOCK_SECONDS,
        cancelled=lambda: bool(stop.name),
    )


def _converse(request, prompts, session, stdin, stdout, stderr) -> int:
    """Answers the prompt, if there is one, and then every line."""
    chat = Chat(
        session, max_tokens=request.max_tokens, sampling=request.sampling, stop=request.stop
    )
    if stdin.isatty():
        print("Ctrl-C stops an answer, an empty line has it go on, Ctrl-D ends.", file=stderr)
    for prompt in prompts:
        _turn(chat, functools.partial(chat.append, prompt), stdout)
    for line in _lines(stdin, stdout):
        if line:
            _turn(chat, functools.partial(chat.say, line), stdout)
        elif not chat.is_empty:
            _turn(chat, None, stdout)
    return 0


def _turn(chat: Chat, speak: Callable[[], None] | None, stdout: TextIO) -> None:
    """Appends what a person says, and shows the answer."""
    last = ""
    with stop_signals([signal.SIGINT]) as stop:
        if speak is not None:
            speak()
        for piece in chat.answer(cancelled=lambda: bool(stop.name), block_seconds=_BLOCK_SECONDS):
            _show(piece, stdout)
            last = piece
    if not last.endswith("\n"):
        _show("\n", stdout)


def _lines(stdin: TextIO, stdout: TextIO) -> Iterator[str]:
    """Lines until the end of the input, at a terminal until Ctrl-C as well."""
    if not stdin.isatty():
        yield from (line.removesuffix("\n") for line in stdin)
        return
    # Lets `input` edit and recall lines.
    import readline  # noqa: F401

    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    _show("\n", stdout)


def _show(text: str, stdout: TextIO) -> None:
    stdout.write(text)
    stdout.flush()


def _room(request: Request, engine: Engine) -> int | None:
    if engine.needs_room:
        return request.max_length or _DEFAULT_ROOM
    if request.max_length is not None:
        raise ConfigError(
            f"--max_length={request.max_length}, but the model has no layers that remember all "
            "tokens; expected no limit, as its cache never gets full"
        )
    return None


def _prompts(request: Request, stdin: TextIO) -> list[str]:
    if request.prompt is not None:
        return [request.prompt]
    if request.prompt_file is not None:
        return [_not_empty(_read("prompt_file", request.prompt_file), request.prompt_file)]
    if request.prompts_file is not None:
        text = _not_empty(_read("prompts_file", request.prompts_file), request.prompts_file)
        prompts = text.removesuffix("\n").split("\n")
        if "" in prompts:
            raise ConfigError(
                f"line {prompts.index('') + 1} of --prompts_file={request.prompts_file!r} is "
                "empty; expected a prompt on every line"
            )
        return prompts
    if request.interactive:
        return []
    if stdin.isatty():
        raise ConfigError(
            "there is no prompt; expected --prompt, --prompt_file, --prompts_file, --interactive, "
            "or text on the standard input"
        )
    try:
        return [_not_empty(stdin.read(), "the standard input")]
    except UnicodeDecodeError as error:
        raise ConfigError(f"the standard input is not UTF-8 text: {error}") from error


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--{flag}={path!r}: {error.strerror}; expected a file that can be read"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--{flag}={path!r}: {error}; expected UTF-8 text") from error


def _not_empty(text: str, where: str) -> str:
    if not text:
        raise ConfigError(f"{where} is empty; expected a prompt")
    return text
