"""Directories of Hugging Face: config.json, safetensors in one file or in shards, a tokenizer."""

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from sparsek_jax.pretrained.source import ConversionError, Source, StoredTensor, reading

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Of weights that are written: in the words of the format, and NumPy's.
DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
}
_INDEX = "model.safetensors.index.json"
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


def open_huggingface(directory: Path) -> Source:
    """Opens a directory; reads its configuration, the headers of its weights and its tokenizer.

    Args:
      directory: With config.json and model.safetensors, or shards and their index.

    Raises:
      ConversionError: A file is missing or damaged, or the weights are pickles.
    """
    config = read_json(directory / "config.json")
    tensors = {}
    for path, names in _weight_files(directory).items():
        stored = _stored_tensors(path)
        for name in list(stored) if names is None else names:
            if name not in stored:
                raise ConversionError(f"{path}: tensor {name} is missing; expected it, by {_INDEX}")
            tensors[name] = stored.pop(name)
        if stored and names is not None:
            raise ConversionError(
                f"{path}: tensor {min(stored)} is not in {_INDEX}; expected every tensor there"
            )
    paths = (directory / name for name in TOKENIZER_FILES)
    return Source(
        path=directory,
        format="Hugging Face directory",
        config=config,
        tensors=tensors,
        tokenizer={path.name: path.read_bytes() for path in paths if path.is_file()},
    )


def write_weights(
    directory: Path,
    tensors: Mapping[str, tuple[int, ...]],
    dtype: str,
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes model.safetensors, one tensor at a time.

    The library's own writer wants all of them in memory at once.

    Args:
      directory: Where to; it exists.
      tensors: Shapes by name.
      dtype: Of all tensors, a key of `DTYPES`.
      arrays: In the order of `tensors` and of these shapes, in any dtype; cast by rounding.
    """
    code, scalar = DTYPES[dtype]
    # transformers reads no file without this entry.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * _WIDTHS[code]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    # The format aligns the data to eight bytes with spaces.
    encoded += b" " * (-len(encoded) % 8)
    with (directory / WEIGHTS).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, shape), array in zip(tensors.items(), arrays, strict=True):
            if array.shape != shape:
                raise ValueError(f"tensor {name} has shape {array.shape}; expected {shape}")
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(array, scalar)
            if not np.isfinite(array).all():
                raise ConversionError(
                    f"tensor {name} is not finite in --dtype={dtype}; expected a wider dtype, or a "
                    "run that has not diverged"
                )
            file.write(array.reshape(-1).view(np.uint8))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ConversionError: The file is missing, damaged or no object.
    """
    with reading(path, "a file with a JSON object"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weight_files(directory: Path) -> dict[Path, Iterable[str] | None]:
    """Files of weights, each with the tensors that the index expects in it."""
    single, index = directory / WEIGHTS, directory / _INDEX
    if single.is_file():
        return {single: None}
    if index.is_file():
        files: dict[Path, list[str]] = {}
        with reading(index, 'a "weight_map" of file names by tensor'):
            for name, file in read_json(index)["weight_map"].items():
                if Path(file).name != file:
                    raise ValueError(f"{file!r} is not the plain name of a file")
                files.setdefault(directory / file, []).append(name)
        return files
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise ConversionError(
            f"{directory / pickles[0]} is a pickle, which can run any program when it is read; "
            "expected safetensors, as transformers' save_pretrained writes them"
        )
    raise ConversionError(f"{directory} holds no weights; expected {WEIGHTS} or {_INDEX}")


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    with reading(path, "a complete safetensors file"):
        # A mapped file would count as memory of this process once more.
        file = safe_open(path, framework="numpy", backend="pread")
        for name in file.keys():  # noqa: SIM118 (no mapping)
            header = file.get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            if dtype not in _WIDTHS:
                raise ConversionError(
                    f"{path}: tensor {name} has dtype {dtype}; expected one of {tuple(_WIDTHS)}"
                )
            read = functools.partial(file.get_tensor, name)
            tensors[name] = StoredTensor(shape, dtype, _WIDTHS[dtype] * math.prod(shape), read)
    return tensors
