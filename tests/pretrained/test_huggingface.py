"""Fixtures of every family, in and out again."""

import json
import shutil

import numpy as np
import pytest

from sparsek_jax.pretrained.exporting import export_model
from sparsek_jax.pretrained.families import AttentionOptions
from sparsek_jax.pretrained.importing import import_model
from sparsek_jax.training.workdir import load_config
from tests.pretrained import models

WINDOWED = {"mistral": 7, "qwen2_window": 5}


def dense(name):
    """Attention that is the model's own."""
    return AttentionOptions(kind="window" if name in WINDOWED else "dense")


@pytest.mark.parametrize("name", models.NAMES)
def test_logits_are_those_of_transformers(name, tmp_path):
    import_model(models.source(tmp_path, name), tmp_path / "run", options=dense(name))
    tokens, logits = models.expected(name)
    np.testing.assert_allclose(models.logits(tmp_path / "run", tokens), logits, atol=1e-4, rtol=0)
    if name in WINDOWED:
        assert load_config(tmp_path / "run").attention.sliding_window == WINDOWED[name]


@pytest.mark.parametrize("name", models.NAMES)
def test_import_of_an_export_is_bitwise_the_same(name, tmp_path):
    origin = models.source(tmp_path, name)
    import_model(origin, tmp_path / "run")
    assert export_model(tmp_path / "run", tmp_path / "exported") == 0
    before, after = models.tensors(origin), models.tensors(tmp_path / "exported")
    scorers = {tensor for tensor in after if ".scorer." in tensor}
    assert len(scorers) == 4
    assert after.keys() - scorers == before.keys()
    for tensor in before:
        np.testing.assert_array_equal(after[tensor], before[tensor], err_msg=tensor)

    again = import_model(tmp_path / "exported", tmp_path / "again")
    assert again.new == again.dropped == ()
    export_model(tmp_path / "again", tmp_path / "twice")
    twice = models.tensors(tmp_path / "twice")
    assert twice.keys() == after.keys()
    for tensor in after:
        np.testing.assert_array_equal(twice[tensor], after[tensor], err_msg=tensor)
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (
            tmp_path / "exported" / file
        ).read_bytes()


def test_selecting_every_key_is_dense_attention(tmp_path):
    tokens, logits = models.expected("llama3")
    options = AttentionOptions(num_selected=16, sliding_window=tokens.shape[1] - 16)
    import_model(models.source(tmp_path, "llama3"), tmp_path / "run", options=options)
    np.testing.assert_allclose(models.logits(tmp_path / "run", tokens), logits, atol=1e-4, rtol=0)


def test_every_option_reaches_the_run_and_comes_back(tmp_path):
    options = AttentionOptions(
        pattern=("window", "sparsek"),
        num_selected=3,
        sliding_window=2,
        gating="straight_through",
    )
    imported = import_model(models.source(tmp_path, "qwen3"), tmp_path / "run", options=options)
    assert [name.split(".")[2] for name in imported.new] == ["1", "1"]
    export_model(tmp_path / "run", tmp_path / "exported")
    again = import_model(tmp_path / "exported", tmp_path / "again")
    assert again.config == imported.config
    assert again.config.attention.pattern == ("window", "sparsek")
    assert again.config.attention.gating == "straight_through"
    # Asked for attention without scorers, an import leaves them out.
    for kind in ("dense", "random"):
        last = import_model(
            tmp_path / "exported", tmp_path / kind, options=AttentionOptions(kind=kind)
        )
        assert sorted(last.dropped) == sorted(imported.new)
        assert last.config.attention.layer_kind(0) == kind
    export_model(tmp_path / "random", tmp_path / "unlearned")
    assert import_model(tmp_path / "unlearned", tmp_path / "last").config == last.config
    options = AttentionOptions(kind="moba", block_size=5)
    blocks = import_model(tmp_path / "exported", tmp_path / "moba", options=options)
    export_model(tmp_path / "moba", tmp_path / "blocks")
    assert import_model(tmp_path / "blocks", tmp_path / "same").config == blocks.config
    assert blocks.config.attention.block_size == 5


def test_seed_decides_the_scorers(tmp_path):
    origin = models.source(tmp_path, "llama3")
    kernels = []
    for i, seed in enumerate((0, 0, 1)):
        import_model(origin, tmp_path / f"run{i}", seed=seed)
        export_model(tmp_path / f"run{i}", tmp_path / f"exported{i}")
        tensors = models.tensors(tmp_path / f"exported{i}")
        kernels.append(tensors["model.layers.0.self_attn.scorer.weight"])
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


def test_export_in_the_dtype_of_the_import_gives_its_bits(tmp_path):
    origin = models.source(tmp_path, "qwen3")
    import_model(origin, tmp_path / "run", options=AttentionOptions(kind="dense"))
    export_model(tmp_path / "run", tmp_path / "exported", dtype="bfloat16")
    before, after = models.tensors(origin), models.tensors(tmp_path / "exported")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 64


def test_an_export_has_the_context_of_what_its_run_started_from(tmp_path):
    import_model(models.source(tmp_path, "llama3"), tmp_path / "run0")
    for i in (1, 2):
        # As if trained on short rows, from the one before.
        workdir = shutil.copytree(tmp_path / f"run{i - 1}", tmp_path / f"run{i}")
        config = load_config(tmp_path / f"run{i - 1}")
        config.init_from, config.data.seq_len = str(tmp_path / f"run{i - 1}"), 16
        (workdir / "config.json").write_text(config.to_json())
        (workdir / "run.json").unlink(missing_ok=True)
    export_model(tmp_path / "run2", tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["max_position_embeddings"] == 64


def test_what_old_files_store_besides_is_left_out(tmp_path):
    origin = models.source(tmp_path, "neox_sequential")

    def add(tensors):
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["gpt_neox.layers.1.attention.masked_bias"] = np.ones((), np.float32)
        tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"]

    models.change_tensors(origin, add)
    imported = import_model(origin, tmp_path / "run")
    assert len(imported.dropped) == 2


def test_an_old_config_without_rope_parameters(tmp_path):
    origin = models.source(
        tmp_path, "pythia", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=10000
    )
    import_model(origin, tmp_path / "run", options=AttentionOptions(kind="dense"))
    tokens, logits = models.expected("pythia")
    np.testing.assert_allclose(models.logits(tmp_path / "run", tokens), logits, atol=1e-4, rtol=0)
