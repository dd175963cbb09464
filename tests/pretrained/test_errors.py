"""What is wrong with a model is named, and nothing is written."""

import json

import numpy as np
import pytest

from sparsek_jax.nn import AttentionConfig, DecoderConfig
from sparsek_jax.pretrained.exporting import export_model
from sparsek_jax.pretrained.families import AttentionOptions, huggingface_config
from sparsek_jax.pretrained.importing import import_model
from sparsek_jax.pretrained.inspecting import describe
from sparsek_jax.pretrained.layout import layout
from sparsek_jax.training.config import ConfigError
from tests.pretrained import models


def fails(tmp_path, directory, match, **options):
    """The import fails with such a message, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=match):
        import_model(directory, tmp_path / "new" / "run", options=AttentionOptions(**options))
    assert sorted(tmp_path.rglob("*")) == before


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def replace(name, array):
    return lambda tensors: tensors.update({name: array})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop(NORM), f"tensor {NORM} of shape .16,. is missing"),
        (rename(NORM, "model.layers.1.norm3.weight"), f"tensor {NORM} .* is missing"),
        (
            replace("model.layers.2.input_layernorm.weight", np.ones(16, np.float32)),
            r"tensor model\.layers\.2\.input_layernorm\.weight of shape .16,. has no place",
        ),
        (
            replace("model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32)),
            r"tensor model\.layers\.0\.self_attn\.q_proj\.bias .* has no place",
        ),
        (replace(NORM, np.ones(17, np.float32)), f"tensor {NORM} has shape .17,.; expected .16,."),
        (replace(NORM, np.ones(16, np.int8)), f"tensor {NORM} has dtype I8; expected"),
        (replace(NORM, np.full(16, np.nan, np.float32)), f"tensor {NORM} holds numbers that are"),
        (
            replace("model.layers.0.self_attn.scorer.weight", np.ones((2, 16), np.float32)),
            r"tensor model\.layers\.0\.self_attn\.scorer\.norm\.weight .* is missing",
        ),
    ],
)
def test_every_tensor_is_accounted_for(change, match, tmp_path):
    directory = models.source(tmp_path, "qwen3")
    models.change_tensors(directory, change)
    fails(tmp_path, directory, match)


def test_a_stored_output_must_be_what_it_is_tied_to(tmp_path):
    directory = models.source(tmp_path, "qwen2_window")
    output = np.ones((48, 16), np.float32)
    models.change_tensors(directory, replace("lm_head.weight", output))
    fails(tmp_path, directory, r"tensor lm_head\.weight differs from model\.embed_tokens\.weight")


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("qwen3", {"model_type": "gemma"}, "model_type='gemma'; expected one of"),
        ("qwen3", {"hidden_size": None}, "hidden_size is missing"),
        ("llama3", {"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight"),
        ("qwen3", {"num_hidden_layers": 3}, "layer_types=.*num_hidden_layers=3"),
        ("qwen3", {"num_key_value_heads": 3}, "attention.num_heads=4; expected a multiple"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu'; expected one of"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config=.*; expected"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn"}}, "qwen3/config.json: .*='yarn'.*not"),
        ("qwen2", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "dynamic.*not"),
        ("llama3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'.*not"),
        ("pythia", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type='dynamic'.*not"),
        ("llama3", {"rope_scaling": "yarn"}, "rope_scaling='yarn'; expected an object"),
        ("pythia", {"num_attention_heads": 0}, "num_attention_heads=0; expected an int of at"),
        ("mistral", {"num_hidden_layers": "2"}, "num_hidden_layers='2'; expected an int"),
        ("mistral", {"sliding_window": -1}, "sliding_window=-1; expected an int of at least 1"),
        ("qwen3", {"max_position_embeddings": "64"}, "max_position_embeddings='64'; expected"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "in some layers only .layer_types"),
        ("qwen3", {"sparsek": "dense"}, "sparsek='dense'; expected an object"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3"}}, "factor is missing"),
        ("pythia", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new'; expected"),
        ("qwen2_window", {"max_window_layers": 1, "layer_types": None}, "in some layers only"),
        ("qwen3", {"vocab_size": 40}, "embed_tokens.weight has shape .48, 16.; expected .40, 16."),
        ("qwen3", {"sparsek": {"kinds": "dense"}}, "sparsek.kinds is unknown; expected"),
        ("qwen3", {"sparsek": {"gating": "hard"}}, "attention.gating='hard'; expected"),
        ("qwen3", {"tie_word_embeddings": True}, "tensor lm_head.weight differs"),
    ],
)
def test_a_config_that_cannot_be_is_refused(name, fields, match, tmp_path):
    fails(tmp_path, models.source(tmp_path, name, **fields), match)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "dense"}, "sliding_window=7; expected one of .'sparsek', 'window', "),
        ({"pattern": ("window", "dense")}, "sliding_window=7; expected one of .'sparsek', "),
        ({"sliding_window": 8}, "--sliding_window=8; expected at most 7"),
        ({"num_selected": 0}, "attention.num_selected=0; expected"),
    ],
)
def test_a_model_of_a_window_is_not_widened(options, match, tmp_path):
    fails(tmp_path, models.source(tmp_path, "mistral"), match, **options)


@pytest.mark.parametrize("kind", ["nsa", "sparsek_linear"])
def test_attention_with_other_parameters_is_refused(kind, tmp_path):
    match = rf"kind '{kind}' has parameters .*; expected one of .'sparsek', 'dense', "
    fails(tmp_path, models.source(tmp_path, "qwen3"), match, kind=kind)
    fails(tmp_path, tmp_path / "qwen3", match, pattern=("dense", kind))
    attention = AttentionConfig(kind=kind, num_heads=4, num_kv_heads=2, head_dim=4)
    config = DecoderConfig(vocab_size=48, num_layers=2, d_model=16, mlp_dim=32, attention=attention)
    with pytest.raises(ConfigError, match=match):
        layout(config)


def test_damaged_files_are_refused(tmp_path):
    directory = models.source(tmp_path, "qwen3")
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-2], content[:100], b"PK\x03\x04" + content, b""):
        weights.write_bytes(damaged)
        fails(tmp_path, directory, "model.safetensors: .*expected a complete safetensors file")
    weights.rename(directory / "pytorch_model.bin")
    fails(tmp_path, directory, "pytorch_model.bin is a pickle.*expected safetensors")
    (directory / "pytorch_model.bin").unlink()
    fails(tmp_path, directory, "holds no weights; expected model.safetensors")
    (directory / "config.json").write_text("{")
    fails(tmp_path, directory, "config.json: .*expected a file with a JSON object")
    fails(tmp_path, tmp_path / "none", "none' does not exist; expected a Hugging Face directory")
    fails(tmp_path, directory / "tokenizer.json", "is neither; expected a Hugging Face directory")


def test_damaged_shards_are_refused(tmp_path):
    directory = models.source(tmp_path, "llama3")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    weight_map = content["weight_map"]
    some = min(weight_map)
    for change, match in (
        ({some: "../model-00001-of-00003.safetensors"}, "is not the plain name of a file"),
        (
            {some: "model-00009-of-00003.safetensors"},
            "model-00009-of-00003.safetensors: .*expected",
        ),
        ({"model.other": weight_map[some]}, "tensor model.other is missing; expected it"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map | change}))
        fails(tmp_path, directory, match)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != some}}))
    fails(tmp_path, directory, f"tensor {some} is not in model.safetensors.index.json")


def test_a_tokenizer_is_needed(tmp_path):
    directory = models.source(tmp_path, "qwen3")
    models.add_tokenizer(directory, size=49)
    fails(tmp_path, directory, "tokenizer has 49 ids; expected at most the model's vocab_size=48")
    for content in ("[]", '{"eos_token": [1]}'):
        (directory / "tokenizer_config.json").write_text(content)
        fails(tmp_path, directory, f"{directory}/tokenizer_config.json.*expected")
    (directory / "tokenizer.json").write_text("[]")
    fails(tmp_path, directory, f"{directory}/tokenizer.json.*expected a Hugging Face tokenizer")
    (directory / "tokenizer.json").unlink()
    fails(tmp_path, directory, "holds no tokenizer; expected a tokenizer.json")
    assert "cannot be imported: " in "\n".join(describe(directory))


def test_nothing_is_overwritten(tmp_path):
    directory = models.source(tmp_path, "qwen3")
    (tmp_path / "empty").mkdir()
    import_model(directory, tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"--workdir=.*exists; expected a new or an empty"):
        import_model(directory, tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"--to=.*exists; expected a new or an empty directory"):
        export_model(tmp_path / "empty", directory)


def test_weights_too_large_for_a_dtype_are_not_written(tmp_path):
    directory = models.source(tmp_path, "qwen3")
    models.change_tensors(directory, replace(NORM, np.full(16, 1e5, np.float32)))
    import_model(directory, tmp_path / "run")
    with pytest.raises(ConfigError, match=f"tensor {NORM} is not finite in --dtype=float16"):
        export_model(tmp_path / "run", tmp_path / "exported", dtype="float16")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("model", "attention", "match"),
    [
        ({"activation": "gelu"}, {}, "model.activation does not fit the family 'llama'"),
        ({"parallel_residual": True}, {}, "model.parallel_residual does not fit .*: True; exp"),
        ({}, {"rotary_fraction": 0.5}, "attention.rotary_fraction does not fit"),
        ({}, {"out_bias": True}, "attention.out_bias does not fit the family 'llama'"),
        ({"mlp_bias": True}, {"qk_norm": True}, "model.mlp_bias does not fit the family 'qwen3'"),
        ({"norm": "layernorm"}, {}, "model.activation does not fit the family 'gpt_neox'"),
    ],
)
def test_blocks_of_no_family_are_not_exported(model, attention, match):
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | attention
    sizes = {"vocab_size": 16, "num_layers": 2, "d_model": 32, "mlp_dim": 64} | model
    config = DecoderConfig(**sizes, attention=AttentionConfig(**attention))
    with pytest.raises(ConfigError, match=match):
        huggingface_config(config, 64)
