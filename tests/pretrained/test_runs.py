"""Imported models used like runs, and runs exported: training, evaluation, the command line."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import of_run, tiny_test
from sparsek_jax.data.tokenizer import HuggingFaceTokenizer
from sparsek_jax.evaluation.evaluate import evaluate
from sparsek_jax.nn import Decoder
from sparsek_jax.pretrained.exporting import export_model
from sparsek_jax.pretrained.importing import import_model
from sparsek_jax.training.checkpoint import restore_params
from sparsek_jax.training.config import ConfigError, decoder_config
from sparsek_jax.training.parameters import define
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
    tuned.attention.pattern = ("window",)
    tuned.init_from = str(directory / "imported")
    tuned.data.glob, tuned.data.root = config.data.glob, config.data.root
    tuned.train.steps, tuned.optimizer.warmup_steps = 1, 0
    tuned.train.eval_every = tuned.sample.length = 0
    tuned.optimizer.learning_rate = 1e-30  # so that the weights stay as they are
    train(tuned, directory / "tuned")
    export_model(directory / "tuned", directory / "tuned_exported")
    before = models.tensors(directory / "exported")
    after = models.tensors(directory / "tuned_exported")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    tuned.data.tokenizer = "bytes"
    with pytest.raises(ConfigError, match=r"data\.tokenizer='bytes', but init_from=.*the same"):
        train(tuned, directory / "other")
    assert not (directory / "other").exists()


def test_only_scorers_may_be_lacking_where_training_starts(trained, directory):
    config = of_run.get_config(directory / "imported")
    config.attention.pattern = ("window", "sparsek")
    definition = define(lambda: Decoder(decoder_config(config, 258), rngs=nnx.Rngs(0)))
    new = {name: jnp.zeros(x.shape) for name, x in definition.abstract.items()}
    scorers = {name: x for name, x in new.items() if ".scorer." in name}
    assert len(scorers) == 4
    arguments = (directory / "imported", definition.abstract)
    params, step = restore_params(*arguments, fallback=scorers)
    assert step == 0
    assert params.keys() == new.keys()
    for name in new:
        assert (params[name] is scorers.get(name)) == (name in scorers)
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.scorer\.kernel is not in the"):
        restore_params(*arguments)


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


def test_command_line(tmp_path):
    origin = models.source(tmp_path, "llama3")
    result = convert("import", f"--from={origin}", f"--workdir={tmp_path}/run", "--num_selected=4")
    assert result.returncode == 0, result.stderr
    assert "20 tensors" in result.stdout
    assert "4 new ones" in result.stdout
    assert of_run.get_config(tmp_path / "run").attention.num_selected == 4


def test_mistakes_on_the_command_line():
    result = convert("inspect", "--from=x", "--workdir=x")
    assert result.returncode == 2
    assert "--workdir does not go with inspect; expected only --from" in result.stderr
