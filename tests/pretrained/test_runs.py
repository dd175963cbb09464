"""Imported models used like runs, and runs exported: training, evaluation, the command line."""

import copy
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import of_run, tiny_test
from sparsek_jax.data.tokenizer import HuggingFaceTokenizer
from sparsek_jax.evaluation.evaluate import evaluate
from sparsek_jax.generation.engine import Engine
from sparsek_jax.generation.loading import load_run
from sparsek_jax.nn import Decoder
from sparsek_jax.nn.config import KINDS_WITH_PARAMETERS
from sparsek_jax.pretrained.exporting import export_model
from sparsek_jax.pretrained.importing import import_model
from sparsek_jax.training.config import ConfigError, decoder_config
from sparsek_jax.training.initial import initial_params
from sparsek_jax.training.parameters import define, split, unstack_layers
from sparsek_jax.training.sharding import make_mesh, tree_shardings
from sparsek_jax.training.trainer import train
from tests.pretrained import models
from tests.training.helpers import ROOT, environment, write_corpus


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(directory):
    """A run of two steps with stacked layers, exported and imported again."""
    corpus = write_corpus(directory / "corpus")
    config = tiny_test.get_config()
    config.data.glob, config.data.root = f"{corpus}/*.txt", f"{corpus}/prepared"
    config.model.num_layers = 4
    config.model.scan_layers = True
    config.attention.pattern = ("window", "dense")  # both compile fast
    config.train.steps, config.optimizer.warmup_steps = 2, 0
    config.train.eval_every = config.sample.length = 0
    result = train(config, directory / "run")
    export_model(directory / "run", directory / "exported")
    import_model(directory / "exported", directory / "imported")
    return config, result.model


def test_stacked_layers_are_exported_in_their_order(trained, directory):
    config, model = trained
    tokens = np.random.default_rng(0).integers(0, 256, (2, 40))
    logits = models.logits(directory / "imported", tokens)
    np.testing.assert_allclose(logits, model(jnp.asarray(tokens)), atol=1e-5)
    imported = of_run.get_config(directory / "imported")
    assert imported.attention.pattern == config.attention.pattern
    assert imported.data.seq_len == config.data.seq_len
    exported = json.loads((directory / "exported" / "config.json").read_text())
    assert exported["max_position_embeddings"] == config.data.seq_len


def test_bytes_are_exported_as_a_tokenizer_with_the_same_ids(trained, directory):
    tokenizer = HuggingFaceTokenizer(directory / "exported" / "tokenizer.json")
    text = "naïve\n\t日本 <|eos|>\x00\x7f"
    assert tokenizer.encode(text).tolist() == list(text.encode())
    ascii_text = "".join(map(chr, range(128)))
    assert tokenizer.encode(ascii_text).tolist() == list(range(128))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    assert tokenizer.exact_bytes


def test_training_starts_from_an_imported_model(trained, directory):
    config, _ = trained
    tuned = of_run.get_config(directory / "imported")
    tuned.model.scan_layers = True  # which the import does not
    origin = shutil.copytree(directory / "imported", directory / "origin")
    tuned.init_from = str(origin)
    tuned.data.glob, tuned.data.root = config.data.glob, config.data.root
    tuned.train.steps, tuned.optimizer.warmup_steps = 1, 0
    tuned.train.eval_every = tuned.sample.length = 0
    tuned.optimizer.learning_rate = 1e-30  # so that the weights stay as they are
    tokens = np.random.default_rng(0).integers(0, 256, (2, 40))
    logits = train(tuned, directory / "tuned").model(jnp.asarray(tokens))
    np.testing.assert_allclose(logits, models.logits(directory / "imported", tokens), atol=1e-5)
    export_model(directory / "tuned", directory / "tuned_exported")
    before = models.tensors(directory / "exported")
    after = models.tensors(directory / "tuned_exported")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    other = copy.deepcopy(tuned)
    other.data.tokenizer = "bytes"
    with pytest.raises(ConfigError, match=r"data\.tokenizer='bytes', but init_from=.*the same"):
        train(other, directory / "other")
    assert not (directory / "other").exists()
    # The run goes on without what it started from.
    shutil.rmtree(origin)
    assert train(tuned, directory / "tuned").finished


def started(directory, config):
    """The parameters of layers by themselves that a run starts with, and the new ones before."""
    config = decoder_config(config, 258)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    abstract = define(lambda: Decoder(config, rngs=nnx.Rngs(0))).abstract
    shardings = tree_shardings(abstract, mesh)
    new = {
        name: jax.device_put(np.full(x.shape, 7, x.dtype), shardings[name])
        for name, x in abstract.items()
    }
    params, step = initial_params(directory, config, new, mesh, vocab_size=258)
    assert step in (0, 2)
    assert {name: x.sharding for name, x in params.items()} == shardings
    return {name: np.asarray(x) for name, x in unstack_layers(params, config).items()}


def test_only_scorers_may_be_lacking_where_training_starts(trained, directory, caplog):
    config = of_run.get_config(directory / "imported")
    config.attention.pattern = ("window", "sparsek")
    for scanned in (False, True):
        config.model.scan_layers = scanned
        params = started(directory / "imported", config)
        new = {name for name, x in params.items() if (x == 7).all()}
        assert len(new) == 4
        assert all(".scorer." in name for name in new)
    assert "not as in init_from" not in caplog.text
    config.attention.rope_theta = 4e5
    started(directory / "imported", config)
    assert "imported': attention.rope_theta=400000.0 (10000.0)" in caplog.text
    for field, value, match in (
        ("num_layers", 6, r"has no parameter layers\.4\.attention.* of shape"),
        ("num_layers", 2, r"has a parameter layers\.2\.attention.*; expected none"),
        ("mlp_dim", 24, r"layers\.0\.mlp\.down\.kernel in shape .64, 32.; expected .24, 32."),
        ("tie_embeddings", not config.model.tie_embeddings, "parameter output of shape"),
    ):
        other = copy.deepcopy(config)
        other.model[field] = value
        with pytest.raises(ConfigError, match=match):
            started(directory / "imported", other)
    edited = shutil.copytree(directory / "imported", directory / "edited")
    (edited / "config.json").write_text(config.to_json())
    with pytest.raises(ConfigError, match=r"edited': parameter layers\.0\..* has shape"):
        started(edited, config)


@pytest.mark.parametrize("kind", KINDS_WITH_PARAMETERS)
def test_what_one_kind_of_attention_has_may_be_lacking(kind, trained, directory):
    config = of_run.get_config(directory / "imported")
    before = started(directory / "imported", config)
    config.attention.pattern = ("window", kind)
    config.attention.num_selected = config.attention.block_size = 4
    params = started(directory / "imported", config)
    assert {name for name, x in params.items() if (x == 7).all()} == params.keys() - before.keys()
    assert all(
        re.match(r"layers\.[13]\.attention\.", name) for name in params.keys() - before.keys()
    )
    for name, x in before.items():
        np.testing.assert_array_equal(params[name], x, err_msg=name)


def test_layers_are_stacked_and_taken_apart_where_training_starts(trained, directory):
    config, model = trained
    stacked, apart = directory / "run", directory / "imported"
    expected = unstack_layers(split(model)[1], decoder_config(config, 258))
    for origin, pattern, scanned in (
        (stacked, ("window", "dense"), False),
        (stacked, ("dense",), True),  # in two stacks there, in one here
        (apart, ("window", "dense"), True),
        (apart, ("window", "dense", "dense", "window"), True),
    ):
        other = copy.deepcopy(config)
        other.attention.pattern, other.model.scan_layers = pattern, scanned
        params = started(origin, other)
        assert params.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_array_equal(params[name], x, err_msg=name)


def test_an_imported_model_is_evaluated_but_not_trained_in_place(trained, directory):
    config, _ = trained
    asked = of_run.get_config(directory / "imported")
    asked.data.glob, asked.data.root = config.data.glob, config.data.root
    asked.eval.batches = 1
    overrides = ("data.glob", "data.root")
    evaluation = evaluate(asked, directory / "imported", overrides=overrides)
    assert evaluation.step == 0
    assert 0 < evaluation.loss.nats_per_token < 8
    asked.train.steps, asked.optimizer.warmup_steps = 1, 0
    with pytest.raises(ConfigError, match=r"holds an imported model and no run; expected another"):
        train(asked, directory / "imported")


def convert(*arguments):
    return subprocess.run(
        [sys.executable, "convert.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_imported_model_is_moved(tmp_path):
    origin = models.source(tmp_path, "llama3")
    result = convert("import", f"--from={origin}", f"--workdir={tmp_path}/run", "--kind=window")
    assert result.returncode == 0, result.stderr
    assert "20 tensors" in result.stdout
    assert "0 new ones" in result.stdout
    shutil.rmtree(origin)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    config = of_run.get_config(moved)
    assert config.attention.kind == "window"  # which compiles fast
    assert config.data.tokenizer == str(moved / "tokenizer" / "tokenizer.json")
    run = load_run(moved)
    engine = Engine(run.model, run.tokenizer, chunk_sizes=(4, 4), block_size=4)
    (completion,) = engine.generate(["w7 w3"], max_tokens=4)
    assert completion.num_tokens > 0
    export_model(moved, tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").is_file()


def test_mistakes_on_the_command_line():
    result = convert("inspect", "--from=x", "--workdir=x")
    assert result.returncode == 2
    assert "--workdir does not go with inspect; expected only --from" in result.stderr
