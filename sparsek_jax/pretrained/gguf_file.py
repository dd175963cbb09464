"""GGUF files of Llama's architecture, dequantised and presented as Hugging Face's Llama."""

import mmap
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float

from sparsek_jax.pretrained.gguf_tokenizer import tokenizer_files
from sparsek_jax.pretrained.source import ConversionError, Source, StoredTensor, reading

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"
# Of every model whose converter writes that tensor instead of the fields.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def open_gguf(path: Path) -> Source:
    """Opens a file; reads its metadata, of which it makes a configuration and a tokenizer.

    Queries and keys come back in the order of Hugging Face: GGUF stores the channels of a head so
    that those which are rotated together lie side by side.

    Raises:
      ConversionError: The file is damaged, of another architecture, or uses what is not supported.
    """
    with reading(path, "a complete GGUF file"):
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConversionError(f"{path}: general.architecture={architecture!r}; expected 'llama'")
    with reading(path, "the metadata of a GGUF file of Llama's architecture"):
        config = _config(path, metadata, stored)
        tokenizer = tokenizer_files(path, metadata)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    pages = reader.data.base
    tensors = {}
    for name, tensor in stored.items():
        if name == _ROPE_FREQUENCIES:
            continue
        base, _, kind = name.removeprefix("blk.").rpartition(".")
        layer, _, module = base.rpartition(".")
        # A name unknown here stays, for the import to refuse it.
        if module in _NAMES:
            prefix = f"model.layers.{layer}." if layer else ""
            name = f"{prefix}{_NAMES[module]}.{kind}"
        tensors[name] = StoredTensor(
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            dtype=tensor.tensor_type.name,
            num_bytes=int(tensor.n_bytes),
            read=_reader(path, tensor, heads.get(module), pages),
        )
    return Source(path, "GGUF file", config, tensors, tokenizer)


def _reader(path: Path, tensor: gguf.ReaderTensor, num_heads: int | None, pages: mmap.mmap):
    def read() -> np.ndarray:
        with reading(path, f"tensor {tensor.name} in a type that the gguf package dequantises"):
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
            array = array.reshape([int(size) for size in reversed(tensor.shape)])
            if array.base is not None:
                array = array.copy()
        # Pages that were read would count as memory of this process.
        pages.madvise(mmap.MADV_DONTNEED)
        return array if num_heads is None else _half_split(array, num_heads)

    return read


def _half_split(array: Float[np.ndarray, "NH ..."], num_heads: int) -> Float[np.ndarray, "NH ..."]:
    """Channels of every head from (0, half, 1, half + 1, ...) to (0, 1, ...)."""
    pairs = array.reshape(num_heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _config(path: Path, metadata: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """A config.json out of the metadata."""

    def field(name, default=None):
        value = metadata.get(f"llama.{name}", default)
        if value is None:
            raise ConversionError(f"{path}: llama.{name} is missing; expected it in the metadata")
        return value

    def number(name, default=None):
        # Stored in float32: 1e-5 comes back as 9.99999974e-6.
        return float(str(np.float32(field(name, default))))

    if field("expert_count", 0):
        raise ConversionError(
            f"{path}: llama.expert_count={field('expert_count')}; expected no mixture of experts"
        )
    d_model, num_heads = field("embedding_length"), field("attention.head_count")
    head_dim = field("attention.key_length", d_model // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if field(name, head_dim) != head_dim:
            raise ConversionError(
                f"{path}: llama.{name}={field(name)}; expected the size of a head, {head_dim}"
            )
    embedding = stored.get("token_embd.weight")
    if embedding is None:
        raise ConversionError(f"{path}: tensor token_embd.weight is missing")
    window = field("attention.sliding_window", 0)
    return {
        "model_type": "mistral" if window else "llama",
        "sliding_window": window or None,
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": d_model,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": field("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": field("context_length"),
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": any(re.search(r"\.attn_\w+\.bias$", name) for name in stored),
        "mlp_bias": any(re.search(r"\.ffn_\w+\.bias$", name) for name in stored),
        "rope_theta": number("rope.freq_base", 1e4),
        "rope_scaling": _rope_scaling(path, field, number, stored),
    }


def _rope_scaling(path: Path, field, number, stored: dict[str, Any]) -> dict[str, Any] | None:
    old_factor = number("rope.scale_linear", 1)  # in files of 2023, without a type
    kind = field("rope.scaling.type", "none" if old_factor == 1 else "linear")
    if kind not in ("none", "linear"):
        # No more of it is read: it will be refused by this name.
        return {"rope_type": kind}
    if _ROPE_FREQUENCIES in stored:
        return _llama3_scaling(path, field, number, stored[_ROPE_FREQUENCIES])
    if kind == "none":
        return None
    factor = old_factor if old_factor != 1 else number("rope.scaling.factor")
    return {"rope_type": kind, "factor": factor}


def _llama3_scaling(path: Path, field, number, tensor: gguf.ReaderTensor) -> dict[str, Any]:
    """The fields that give the divisors of the frequencies, which are all that GGUF keeps."""
    divisors = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float64)
    factor = float(divisors.max())
    half = np.arange(divisors.size) / divisors.size
    turns = number("rope.freq_base", 1e4) ** -half
    turns *= _LLAMA3["original_max_position_embeddings"] / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(1 / divisors, kept + (1 - kept) / factor, rtol=1e-3):
        raise ConversionError(
            f"{path}: tensor {_ROPE_FREQUENCIES} is not the scaling of Llama 3.1; expected that"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
