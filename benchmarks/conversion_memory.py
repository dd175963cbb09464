"""Peak memory of importing and exporting a synthetic Llama of about 500 MB in float32.

    python -m benchmarks.conversion_memory

Every conversion runs in a process of its own. What a tiny model takes (Python, JAX,
Orbax) is not counted.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import ml_dtypes
import numpy as np
import tokenizers
from absl import app, flags
from safetensors.numpy import save_file

from sparsek_jax.nn import AttentionConfig, DecoderConfig
from sparsek_jax.pretrained.exporting import export_model
from sparsek_jax.pretrained.families import decoder_fields
from sparsek_jax.pretrained.importing import import_model
from sparsek_jax.pretrained.layout import layout

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
    """Makes the model and measures both conversions, for every dtype that it may be stored in."""
    if _COMMAND.value:
        _convert(*_COMMAND.value)
        return
    for dtype in (np.dtype("float32"), np.dtype(ml_dtypes.bfloat16)):
        with tempfile.TemporaryDirectory() as directory:
            tiny, large = (pathlib.Path(directory) / name for name in ("tiny", "large"))
            _write(tiny, _CONFIG | _TINY, dtype)
            num_bytes = _write(large, _CONFIG, dtype)
            for arguments in (("import", "origin", "run"), ("export", "run", "exported")):
                least, peak = (_measure(model, *arguments) for model in (tiny, large))
                print(
                    f"{arguments[0]} {dtype.name}: model in float32 {num_bytes / 1e6:.0f} MB, "
                    f"peak {peak / 1e6:.0f} MB, with a tiny model {least / 1e6:.0f} MB: "
                    f"{(peak - least) / num_bytes:.2f} x the model",
                    flush=True,
                )


def _measure(directory, name, *directories):
    command = [name, *(str(directory / path) for path in directories)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.conversion_memory", f"--command={','.join(command)}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(process.stdout)


def _convert(name, origin, target):
    if name == "import":
        import_model(pathlib.Path(origin), pathlib.Path(target))
    else:
        export_model(origin, pathlib.Path(target))
    # Other than that of getrusage, this peak does not begin with the parent's.
    status = pathlib.Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024)


def _write(directory, config, dtype):
    directory = directory / "origin"
    directory.mkdir(parents=True)
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
    return sum(tensor.size * 4 for tensor in tensors.values())


if __name__ == "__main__":
    app.run(main)
