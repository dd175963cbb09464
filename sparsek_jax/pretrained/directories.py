"""Directories that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from sparsek_jax.pretrained.source import ConversionError


def check_new(flag: str, directory: Path) -> None:
    """Checks that a directory is not there yet, or empty.

    Raises:
      ConversionError: It holds something.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConversionError(
            f"--{flag}={str(directory)!r} exists; expected a new or an empty directory"
        )


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A directory beside the wanted one that takes its place at the end, or vanishes.

    So do the parents that had to be made for it.

    Args:
      directory: The wanted one, which passes `check_new`.

    Yields:
      Where to write.
    """
    directory = directory.absolute()
    staging = directory.with_name(f".{directory.name}.{os.getpid()}")
    made = [parent for parent in staging.parents if not parent.exists()]
    staging.mkdir(parents=True)
    try:
        yield staging
        os.replace(staging, directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # Somebody else may use it by now.
                parent.rmdir()
        raise


def write_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    """Writes files by name into a directory, which is made if need be, and returns it."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory
