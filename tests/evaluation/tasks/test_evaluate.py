import dataclasses
import io
import json
import re

import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from sparsek_jax.data import load_tokenizer
from sparsek_jax.evaluation.tasks import TASKS
from sparsek_jax.evaluation.tasks.evaluate import evaluate_tasks
from sparsek_jax.evaluation.tasks.report import print_task, write_task
from sparsek_jax.evaluation.tasks.task import encode_example
from sparsek_jax.training.checkpoint import restore_model
from sparsek_jax.training.config import ConfigError, decoder_config


@pytest.fixture
def config(run):
    config = run.config.copy_and_resolve_references()
    config.eval.task_lengths = (450, 430)
    config.eval.task_depths = (0.0, 1.0)
    config.eval.task_samples = 3
    return config


def expected(model, task, length, depth):
    """Right answers and nats per token, by whole logits of one example at a time."""
    correct, nats, tokens = 0, 0.0, 0
    logits_of = nnx.jit(lambda model, tokens: model(tokens))
    for i in range(3):
        rng = np.random.default_rng([0, length, i])
        example = task.make(load_tokenizer("bytes"), length, depth, rng)
        text = np.concatenate([example.prompt, example.answer])
        padded = np.pad(text, (0, 480 - len(text)))[None]
        logits = np.asarray(logits_of(model, padded), np.float64)[0]
        logits = logits[len(example.prompt) - 1 : len(text) - 1]
        correct += (logits.argmax(-1) == example.answer).all()
        normaliser = np.log(np.exp(logits).sum(-1))
        nats += (normaliser - logits[np.arange(len(logits)), example.answer]).sum()
        tokens += len(example.answer)
    return correct, nats / tokens


def test_cells_equal_those_of_whole_logits(run, config):
    model, _ = restore_model(run.workdir, decoder_config(config, 258))
    (evaluation,) = evaluate_tasks(config, run.workdir, ["passkey"])
    assert evaluation.label == "sparsek"
    assert (evaluation.task, evaluation.step) == ("passkey", 2)
    cells = evaluation.cells
    assert [(c.length, c.depth) for c in cells] == [(430, 0), (430, 1), (450, 0), (450, 1)]
    for cell in cells[::3]:
        correct, nats = expected(model, TASKS["passkey"], cell.length, cell.depth)
        assert (cell.correct, cell.samples) == (correct, 3)
        assert cell.nats_per_token == pytest.approx(nats, rel=1e-5)
    assert evaluation.notes == ("Prompts have up to 450 tokens; the run was trained on 32.",)


def test_report(run, config):
    config.attention.kind = "dense"
    config.eval.task_lengths = (460,)
    # Another text does not matter.
    config.data.glob = "/nowhere/*.txt"
    overrides = ["attention.kind", "data.glob"]
    names = ["key_value", "niah_single_1", "mqar"]
    evaluations = list(evaluate_tasks(config, run.workdir, names, overrides=overrides))
    assert [evaluation.task for evaluation in evaluations] == names
    for evaluation in evaluations:
        json_path, png_path = write_task(evaluation)
        assert json_path == run.workdir / "eval" / f"dense.{evaluation.task}.json"
        written = json.loads(json_path.read_text())
        depths = [0, 1] if TASKS[evaluation.task].has_depth else [None]
        assert [cell["depth"] for cell in written["cells"]] == depths
        assert written["measure"] == TASKS[evaluation.task].measure
        assert written["config"]["eval"]["task_samples"] == 3
        assert png_path.read_bytes().startswith(b"\x89PNG")
        output = io.StringIO()
        print_task(evaluation, Console(file=output, width=120))
        assert re.search(rf"{depths[-1] or 'any'} .* \d+% \(\d+\.\d\d\)", output.getvalue())
        assert "460 tokens" in output.getvalue()
        for path in (json_path, png_path):
            path.unlink()
    (run.workdir / "eval").rmdir()


@dataclasses.dataclass(frozen=True)
class Echo:
    """Asks for the beginning of what the model of a run writes after "ab", and for more."""

    written: str
    name: str = "echo"
    measure: str = "share of the echo"
    has_depth: bool = False

    def make(self, tokenizer, length, depth, rng):
        assert (length, depth) == (430, None)
        rng.random()
        references = (self.written[:3], self.written[:4], "never", "neither")
        return encode_example(tokenizer, "ab", "cd", references=references, max_tokens=9)


def test_tasks_that_let_the_model_write(run, config, monkeypatch):
    config.eval.task_lengths = (430,)
    model, _ = restore_model(run.workdir, decoder_config(config, 258))
    logits_of = nnx.jit(lambda model, tokens: model(tokens))
    tokens = np.pad([256, *b"ab"], (0, 10))[None]
    for at in range(3, 7):
        tokens[0, at] = np.asarray(logits_of(model, tokens))[0, at - 1].argmax()
    written = load_tokenizer("bytes").decode(tokens[0, 3:7])
    monkeypatch.setitem(TASKS, "echo", Echo(written))

    (evaluation,) = evaluate_tasks(config, run.workdir, ["echo"])
    (cell,) = evaluation.cells
    assert (cell.depth, cell.samples, cell.correct, cell.accuracy) == (None, 3, 0, 0.5)
    assert 0 < cell.nats_per_token < 20
    output = io.StringIO()
    print_task(evaluation, Console(file=output, width=120))
    pattern = r"echo: share of the echo, 3 samples .* any .* 50% \("
    assert re.search(pattern, output.getvalue(), re.DOTALL)
    paths = write_task(evaluation)
    assert json.loads(paths[0].read_text())["cells"][0]["depth"] is None
    for path in paths:
        path.unlink()
    (run.workdir / "eval").rmdir()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("task_lengths", (430, 100), r"eval\.task_lengths, task passkey: length=100; expected at"),
        ("task_lengths", (), r"eval\.task_lengths=\(\); expected integers"),
        ("task_depths", (0.0, 1.5), r"eval\.task_depths=\(0\.0, 1\.5\); expected numbers from 0"),
        ("task_samples", 0, r"eval\.task_samples=0; expected at least 1"),
    ],
)
def test_impossible_grids_are_refused(run, config, field, value, message):
    config.eval[field] = value
    with pytest.raises(ConfigError, match=message):
        next(evaluate_tasks(config, run.workdir, ["passkey"]))


def test_unknown_tasks_and_runs_are_refused(run, config, tmp_path):
    with pytest.raises(ConfigError, match="tasks has 'needle'"):
        next(evaluate_tasks(config, run.workdir, ["needle"]))
    with pytest.raises(FileNotFoundError, match="no run"):
        next(evaluate_tasks(config, tmp_path, ["passkey"]))
