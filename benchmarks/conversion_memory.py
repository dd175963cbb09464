"""Peak memory of importing and exporting synthetic Llamas of 500 MB in float32, or other models.

    python -m benchmarks.conversion_memory [--from=PATH,...]

Every conversion runs in a process of its own. What a tiny model takes (Python, JAX,
Orbax) is not counted.
"""

import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

import ml_dtypes  # noqa: F401 (bfloat16 for NumPy)
import numpy as np
import tokenizers
from absl import app, flags
from safetensors.numpy import save_file

from sparsek_jax.nn import AttentionConfig, DecoderConfig
from sparsek_jax.pretrained.exporting import export_model
from sparsek_jax.pretrained.families import decoder_fields
from sparsek_jax.pretrained.importing import import_model, open_source
from sparsek_jax.pretrained.layout import layout
from sparsek_jax.pretrained.memory import unmap_freed_blocks

_FROM = flags.DEFINE_list("from", [], "Hugging Face directories and GGUF files to measure instead.")
_COMMAND = flags.DEFINE_list("command", None, "Internal: a conversion and its two directories.")
_CONFIG = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
_TINY = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 64}


def main(_):
    """Makes the models and measures both conversions of each."""
    if _COMMAND.value:
        _convert(*_COMMAND.value)
        return
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        tiny = directory / "tiny"
        _write(tiny, _CONFIG | _TINY, np.dtype("float32"))
        least = _peaks(tiny)
        models = [pathlib.Path(path) for path in _FROM.value]
        if not models:
            models = [directory / dtype for dtype in ("float32", "bfloat16")]
            for model in models:
                _write(model, _CONFIG, np.dtype(model.name))
        for model in models:
            tensors = open_source(model).tensors.values()
            num_bytes = 4 * sum(math.prod(tensor.shape) for tensor in tensors)
            for name, peak in _peaks(model).items():
                print(
                    f"{name} {model.name}: model in float32 {num_bytes / 1e6:.0f} MB, "
                    f"peak {peak / 1e6:.0f} MB, with a tiny model {least[name] / 1e6:.0f} MB: "
                    f"{(peak - least[name]) / num_bytes:.2f} x the model",
                    flush=True,
                )


def _peaks(model):
    """Bytes that an import of a model takes, and the export of what it made."""
    with tempfile.TemporaryDirectory() as directory:
        return {
            "import": _measure("import", model, f"{directory}/run"),
            "export": _measure("export", f"{directory}/run", f"{directory}/exported"),
        }


def _measure(*command):
    process = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.conversion_memory"),
            f"--command={','.join(map(str, command))}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(process.stdout)


def _convert(name, origin, target):
    unmap_freed_blocks()
    if name == "import":
        import_model(pathlib.Path(origin), pathlib.Path(target))
    else:
        export_model(origin, pathlib.Path(target))
    # Other than that of getrusage, this peak does not begin with the parent's.
    status = pathlib.Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024)


def _write(directory, config, dtype):
    directory.mkdir()
    model, attention = decoder_fields(config)
    decoder = DecoderConfig(**model, attention=AttentionConfig(**attention))
    rng = np.random.default_rng(0)
    tensors = {
        tensor.name: rng.standard_normal(tensor.shape, np.float32).astype(dtype)
        for tensor in layout(decoder)
        if not tensor.is_scorer
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    vocab = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")
    tokenizers.Tokenizer(vocab).save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    app.run(main)
