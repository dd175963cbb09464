"""Runs a script's main; a mistake of the user's is one clear line, not a traceback."""

import contextlib
import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging

from sparsek_jax.training.checkpoint import CheckpointError
from sparsek_jax.training.config import ConfigError, default_config, flat_fields
from sparsek_jax.training.trainer import TrainingDivergedError


def run(
    main: Callable[..., None], *, commands: Sequence[str] = (), takes_arguments: bool = False
) -> None:
    """Parses the flags, runs `main` and exits.

    The status is 2 after a mistake of the user's: a mistyped or impossible flag or `--config` field
    (the message suggests the nearest), a recipe that cannot be read, a missing file, and whatever
    else raises `ConfigError` or `OSError`. It is 1 if training diverged or a checkpoint cannot be
    read or written.

    Args:
      main: The program.
      commands: Names one of which is the first argument, and given to `main`; none: it has no
        arguments.
      takes_arguments: Whether what is no flag, and no command, is given to `main` too.
    """
    app.define_help_flags()
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    _check_field_names(sys.argv[1:])
    try:
        arguments = flags.FLAGS(sys.argv)
    except flags.Error as error:
        _fail(_flag_error(error), status=2)
    except Exception as error:  # A recipe is a program: whatever it raises.
        _fail(f"--config cannot be read: {_innermost(error)}", status=2)
    arguments = arguments[1:]
    if commands:
        if not arguments or arguments[0] not in commands:
            given = repr(arguments[0]) if arguments else "nothing"
            _fail(f"the command is {given}; expected one of {', '.join(commands)}", status=2)
        main = functools.partial(main, arguments.pop(0))
    if takes_arguments:
        main = functools.partial(main, *arguments)
    elif arguments:
        hint = ", with patterns in quotes (--config.data.glob='texts/*.txt')"
        _fail(
            f"unexpected argument {arguments[0]!r}; expected --flag=value"
            + (hint if "config" in flags.FLAGS else ""),
            status=2,
        )
    with clear_errors():
        main()


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Exits with one line instead of a traceback, and with the status that `run` tells."""
    try:
        yield
    except (ConfigError, OSError) as error:
        _fail(error, status=2)
    except (TrainingDivergedError, CheckpointError) as error:
        _fail(error, status=1)


def _check_field_names(arguments: list[str]) -> None:
    """Fails on an override of a field that no recipe has."""
    fields = flat_fields(default_config())
    for argument in arguments:
        match = re.match(r"--?config\.([^=]+)", argument)
        if match and match[1] not in fields:
            nearest = difflib.get_close_matches(match[1], fields, n=1)
            hint = f"; did you mean config.{nearest[0]}?" if nearest else ""
            _fail(f"config.{match[1]} is not a field of the configuration{hint}", status=2)


def _flag_error(error: flags.Error) -> str:
    """The message of an error about a flag, without the traceback that a recipe's may hold."""
    lines = str(error).splitlines()
    return f"--config cannot be read: {lines[-1]}" if len(lines) > 1 else lines[0]


def _innermost(error: BaseException) -> str:
    """The message of an error that others were made from, with the error's name."""
    if isinstance(error, OSError) and error.__cause__ is not None:
        # What an override says of a recipe that failed to load.
        error = error.__cause__
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    # KeyError prints its argument quoted.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{type(error).__name__}: {message}"


def _fail(message: object, *, status: int) -> None:
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)
