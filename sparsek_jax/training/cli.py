"""Runs a script's main; a mistake of the user's is one clear line, not a traceback."""

import sys
from collections.abc import Callable

from absl import app, logging

from sparsek_jax.training.config import ConfigError


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags, runs `main` and exits; the status is 2 after a mistake of the user's.

    Mistakes are a mistyped or impossible `--config` field (the message suggests the nearest), a
    missing file, and whatever else raises `ConfigError` or `FileNotFoundError`.
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    try:
        argv = app.parse_flags_with_usage(sys.argv)
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        _fail(error)
    try:
        main(argv)
    except (ConfigError, FileNotFoundError) as error:
        _fail(error)


def _fail(error: Exception) -> None:
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
