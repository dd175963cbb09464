"""GGUF files made of the Llama fixture, quantised ones, and their tokenizers."""

import json

import gguf
import numpy as np
import pytest
import tokenizers

from sparsek_jax.data.tokenizer import HuggingFaceTokenizer, train_bpe
from sparsek_jax.pretrained.families import AttentionOptions
from sparsek_jax.pretrained.gguf_file import open_gguf
from sparsek_jax.pretrained.gguf_tokenizer import tokenizer_files
from sparsek_jax.pretrained.importing import import_model
from sparsek_jax.training.config import ConfigError
from tests.pretrained import models

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
METADATA = {
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 8,
    "llama.attention.value_length": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 8,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", *(chr(0x21 + i) for i in range(45)), "!!"],
    "tokenizer.ggml.token_type": [3, 3] + [1] * 46,
    "tokenizer.ggml.merges": ["! !"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def interleaved(array, heads):
    """Channels of a head as GGUF stores them, the two of a rotated pair side by side."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write(path, tensors, metadata=METADATA, architecture="llama"):
    """Writes tensors, with names of Hugging Face, each with the type it is stored in."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (array, kind) in tensors.items():
        module, _, suffix = name.rpartition(".")
        prefix = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}."
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
        stored = array if heads is None else interleaved(array, heads)
        data = gguf.quantize(stored, kind)
        name = f"{prefix}{NAMES.get(module, module)}.{suffix}"
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def fixture_tensors(kind=gguf.GGMLQuantizationType.F32):
    tensors = models.tensors(models.FIXTURES / "llama3")
    return {name: (array, kind) for name, array in tensors.items()}


def rope_divisors(factor):
    """What Llama 3.1's converter stores, in its own words."""
    divisors = []
    for frequency in 1 / 5e5 ** (np.arange(0, 8, 2) / 8):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_logits_are_those_of_the_same_model_in_safetensors(tmp_path):
    config = {"rope_parameters": None, "rope_theta": 10000.0}
    origin = models.source(tmp_path, "llama3", **config)
    dense = AttentionOptions(kind="dense")
    import_model(origin, tmp_path / "expected", options=dense)
    path = write(tmp_path / "model.gguf", fixture_tensors())
    imported = import_model(path, tmp_path / "run", options=dense)
    assert imported.config.norm_eps == 1e-6
    assert imported.config.tie_embeddings
    tokens, _ = models.expected("llama3")
    np.testing.assert_array_equal(
        models.logits(tmp_path / "run", tokens), models.logits(tmp_path / "expected", tokens)
    )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_1"])
def test_tensors_are_dequantised(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    array = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = fixture_tensors() | {name: (array, kind)}
    stored = open_gguf(write(tmp_path / "model.gguf", tensors)).tensors[name]
    assert stored.dtype == kind.name
    assert stored.shape == (16, 64)
    read = stored.read()
    step = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.03}.get(kind.name, 0.6)
    np.testing.assert_allclose(read, array, atol=step)
    np.testing.assert_array_equal(read, stored.read())


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_scaling_is_found_in_both_its_forms(metadata, tmp_path):
    source = open_gguf(write(tmp_path / "model.gguf", fixture_tensors(), METADATA | metadata))
    assert source.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaling_of_llama_3_is_found_in_its_tensor(factor, tmp_path):
    divisors = rope_divisors(factor)
    tensors = fixture_tensors()
    tensors["rope_freqs.weight"] = (divisors, gguf.GGMLQuantizationType.F32)
    metadata = METADATA | {"llama.rope.freq_base": 5e5}
    source = open_gguf(write(tmp_path / "model.gguf", tensors, metadata))
    assert source.config["rope_scaling"]["rope_type"] == "llama3"
    assert source.config["rope_scaling"]["factor"] == factor
    assert "rope_freqs.weight" not in source.tensors
    tensors["rope_freqs.weight"] = (divisors[::-1].copy(), gguf.GGMLQuantizationType.F32)
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not the scaling of Llama 3\.1"):
        open_gguf(write(tmp_path / "other.gguf", tensors, metadata))


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count=8; expected no mixture"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4; expected the size"),
        ({"llama.rope.scaling.type": "yarn"}, "model.gguf: .*rope_type='yarn'.*not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_type='longrope'.*not supported"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert'; expected"),
        ({"tokenizer.ggml.pre": "chameleon"}, "tokenizer.ggml.pre='chameleon'; expected"),
        ({"tokenizer.ggml.merges": None}, "KeyError.*expected the metadata of a GGUF file"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "has 2 entries, 1 of them different"),
    ],
)
def test_metadata_that_cannot_be_is_refused(metadata, match, tmp_path):
    metadata = {k: v for k, v in (METADATA | metadata).items() if v is not None}
    path = write(tmp_path / "model.gguf", fixture_tensors(), metadata)
    with pytest.raises(ConfigError, match=match):
        import_model(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = write(tmp_path / "model.gguf", fixture_tensors())
    content = path.read_bytes()
    for damaged in (content[:-3000], content[:200], b"GG", b"PK" + content):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="expected a complete GGUF file"):
            import_model(path, tmp_path / "run")
    other = write(tmp_path / "other.gguf", fixture_tensors(), architecture="gemma")
    with pytest.raises(ConfigError, match=r"general\.architecture='gemma'; expected 'llama'"):
        import_model(other, tmp_path / "run")
    tensors = fixture_tensors()
    tensors["model.layers.0.self_attn.surprise.weight"] = tensors["model.norm.weight"]
    surprise = write(tmp_path / "surprise.gguf", tensors)
    with pytest.raises(ConfigError, match=r"tensor blk\.0\.self_attn\.surprise\.weight .*no place"):
        import_model(surprise, tmp_path / "run")
    assert not (tmp_path / "run").exists()


TEXTS = ["The year 1984, isn't it?", "  x = [10, 200]\n\n\ty", "naïve été 日本", "</s>"]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_byte_level_tokenizer(pre, tmp_path):
    train_bpe([*TEXTS * 3, "1984", "198,4"] * 3, 400, tmp_path / "tokenizer.json")
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    files = tokenizer_files(
        tmp_path / "model.gguf",
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": vocab,
            "tokenizer.ggml.token_type": [3, 3] + [1] * (len(vocab) - 2),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in saved["model"]["merges"]],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.chat_template": "{{ messages }}",
        },
    )
    (tmp_path / "made").mkdir()
    for name, content in files.items():
        (tmp_path / "made" / name).write_bytes(content)
    tokenizer = HuggingFaceTokenizer(tmp_path / "made" / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.exact_bytes
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    if pre == "gpt-2":
        trained = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
        assert [tokenizer.encode(text).tolist() for text in TEXTS] == [
            trained.encode(text).tolist() for text in TEXTS
        ]
    digits = [vocab[i] for i in tokenizer.encode("1984")]
    words = {"gpt-2": ["1984"], "smollm": ["1", "9", "8", "4"], "llama-bpe": ["198", "4"]}
    assert digits == words[pre]
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ messages }}"


def test_sentencepiece_tokenizer(tmp_path):
    pieces = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0}
    pieces |= {f"<0x{i:02X}>": 0.0 for i in range(256)}
    pieces |= {"▁a": -1.0, "bc": -2.0, "ab": -3.0, "▁ab": -4.0, "abc": -5.0}
    pieces |= {"▁": -6.0, "a": -7.0, "b": -8.0, "c": -9.0}
    types = [2, 3, 3] + [6] * 256 + [1] * 9
    files = tokenizer_files(
        tmp_path / "model.gguf",
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": list(pieces),
            "tokenizer.ggml.scores": list(pieces.values()),
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        },
    )
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    # The best pair first, not the longest piece: ▁a is joined before ab could be.
    assert tokenizer.encode("abc").tokens == ["▁a", "bc"]
    assert tokenizer.encode("c é").tokens == ["▁", "c", "▁", "<0xC3>", "<0xA9>"]
    for text in ("abc", "c é", " ab  c"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
