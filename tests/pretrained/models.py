"""Small foreign models to import: the committed fixtures, and changed copies of them."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (bfloat16 for NumPy)
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

from sparsek_jax.generation.loading import load_run

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir())


def source(tmp_path, name, **fields):
    """A copy of a fixture with a tokenizer, and with other fields in config.json; None: without."""
    directory = tmp_path / name
    shutil.copytree(FIXTURES / name, directory)
    add_tokenizer(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return directory


def add_tokenizer(directory, size=48):
    """A tokenizer of so many words."""
    vocab = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w2"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def change_tensors(directory, change):
    """Applies a function to the dict of tensors of a directory."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def tensors(directory):
    """Every tensor of a directory, in float32."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def expected(name):
    """Tokens and transformers' logits of a fixture."""
    with np.load(FIXTURES / name / "expected.npz") as file:
        return file["tokens"], file["logits"]


def logits(workdir, tokens):
    """Logits of the model in a directory of this library."""
    graphdef, state = nnx.split(load_run(workdir).model)
    return _logits(graphdef, state, jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)
