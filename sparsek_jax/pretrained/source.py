"""A model in a foreign file, as every format presents it: a configuration, tensors, a tokenizer."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sparsek_jax.training.config import ConfigError


class ConversionError(ConfigError):
    """A model that cannot be converted; the message names what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read yet.

    Attributes:
      shape: Of the tensor.
      dtype: What it is stored in, in the words of the format: "BF16", "Q4_1".
      num_bytes: Its size in the file.
      read: Returns it, in a floating-point dtype of NumPy or ml_dtypes.
    """

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    read: Callable[[], Float[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model in the terms of Hugging Face, whatever the file.

    Attributes:
      path: Of the file or directory.
      format: Its name, for people.
      config: Contents of a config.json.
      tensors: By their names in Hugging Face's implementation of the model.
      tokenizer: Contents of the files of the tokenizer, by name; empty if there is none.
    """

    path: Path
    format: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    tokenizer: dict[str, bytes]

    @property
    def config_path(self) -> Path:
        """The file that the configuration is from."""
        return self.path / "config.json" if self.path.is_dir() else self.path


@contextlib.contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turns whatever a reader of foreign files raises into one clear error."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:  # Readers fail in many ways on a damaged file.
        raise ConversionError(
            f"{path}: {type(error).__name__}: {error}; expected {expected}"
        ) from error
