"""Whole evaluations by the harness against whole logits of one text at a time.

Needs the package `lm_eval`, which CI does not install (docs/evaluation.md says how), and is skipped
without it. What the model is made of is tested without it, beside this file.
"""

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness (docs/evaluation.md)")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from sparsek_jax.evaluation.harness import __main__ as command
from sparsek_jax.evaluation.harness import register
from sparsek_jax.evaluation.harness.model import SparseKLM
from sparsek_jax.generation.loading import load_run
from sparsek_jax.training.config import ConfigError

TASKS = Path(__file__).with_name("tasks")
WIDTH = 512
LOGITS = nnx.jit(lambda model, tokens: model(tokens))


class Naive:
    """A run's answers, out of whole logits, in float64."""

    def __init__(self, workdir):
        run = load_run(workdir)
        self.model, self.tokenizer = run.model, run.tokenizer

    def encode(self, text):
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()]

    def logits(self, ids):
        padded = np.pad(ids, (0, WIDTH - len(ids)))[None]
        return np.asarray(LOGITS(self.model, padded), np.float64)[0, : len(ids)]

    def score(self, ids, count):
        """Nats of the last `count` tokens, and whether they are the likeliest ones."""
        logits = self.logits(ids)[-count - 1 : -1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = np.array(ids[-count:])
        return log_p[np.arange(count), targets].sum(), (log_p.argmax(-1) == targets).all()

    def continuation(self, context, text):
        ids = self.encode(context + text)
        return self.score(ids, len(ids) - len(self.encode(context)))

    def write(self, ids, until, max_tokens):
        begin = len(ids)
        while len(ids) < begin + max_tokens:
            token = int(self.logits(ids)[-1].argmax())
            if token == self.tokenizer.eos_id:
                break
            ids = [*ids, token]
        text = self.tokenizer.decode(ids[begin:])
        for stop in until:
            text = text.split(stop)[0]
        return text


def documents(name):
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def check_tasks(workdir, **model_args):
    """Holds the harness's results on the three tasks to those of a naive model."""
    register()
    outcome = lm_eval.simple_evaluate(
        model="sparsek",
        model_args={"workdir": str(workdir), **model_args},
        tasks=["local_choice", "local_writing", "local_text"],
        task_manager=TaskManager(include_path=str(TASKS)),
        batch_size=3,
    )
    results, naive = outcome["results"], Naive(workdir)
    samples = {
        name: sorted(outcome["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        for name in ("choice", "writing", "text")
    }

    right, right_by_length = [], []
    for document, sample in zip(documents("choice"), samples["choice"], strict=True):
        choices = document["choices"]
        expected = [naive.continuation(document["question"], f" {choice}") for choice in choices]
        for (nats, greedy), (found, found_greedy) in zip(
            expected, sample["filtered_resps"], strict=True
        ):
            assert found == pytest.approx(nats, rel=1e-5, abs=1e-5)
            assert found_greedy == greedy
        nats = np.array([nats for nats, _ in expected])
        right.append(nats.argmax() == document["answer"])
        right_by_length.append((nats / [len(c) for c in choices]).argmax() == document["answer"])
    assert results["local_choice"]["acc,none"] == pytest.approx(np.mean(right))
    assert results["local_choice"]["acc_norm,none"] == pytest.approx(np.mean(right_by_length))

    exact = []
    for document, sample in zip(documents("writing"), samples["writing"], strict=True):
        text = naive.write(naive.encode(document["prompt"]), ["\n", "."], 12)
        assert sample["filtered_resps"] == [text]
        exact.append(text == document["answer"])
    assert results["local_writing"]["exact_match,none"] == pytest.approx(np.mean(exact))

    total = 0.0
    for document, sample in zip(documents("text"), samples["text"], strict=True):
        nats, _ = naive.continuation("", document["text"])
        assert sample["filtered_resps"] == [pytest.approx(nats, rel=1e-5)]
        total += nats
    num_bytes = sum(len(document["text"].encode()) for document in documents("text"))
    bits = -total / num_bytes / math.log(2)
    assert results["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    return {name: results[f"local_{name}"] for name in samples}


@pytest.fixture
def in_repository(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


@pytest.fixture
def log(caplog):
    # The harness keeps its messages from the root logger.
    logger = logging.getLogger("lm_eval.models.sparsek")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, 0) for pair in arguments]


def test_results_are_those_of_whole_logits(run, in_repository):
    check_tasks(run.workdir)


def test_the_command_line_writes_results(run, in_repository, monkeypatch, tmp_path, capsys):
    arguments = f"""--model sparsek --model_args workdir={run.workdir},kind=window,sliding_window=5
        --batch_size 4 --include_path {TASKS} --tasks local_choice --output_path {tmp_path}"""
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments.split()])
    command.main()
    assert "|local_choice|" in capsys.readouterr().out
    (path,) = tmp_path.rglob("results_*.json")
    arguments = json.loads(path.read_text())["config"]["model_args"]
    assert (arguments["kind"], arguments["sliding_window"]) == ("window", 5)

    monkeypatch.setattr(sys, "argv", [a.replace("window=5", "windw=5") for a in sys.argv])
    with pytest.raises(SystemExit) as exit_info:
        command.main()
    assert exit_info.value.code == 2
    assert "did you mean sliding_window?" in capsys.readouterr().err


def test_texts_beyond_the_maximum_lose_their_first_tokens(run, log):
    model, naive = SparseKLM(run.workdir, batch_size=2, max_length=20), Naive(run.workdir)
    pairs = [("the beginning of a long context", " end"), ("", "abc"), ("short", " one")]
    found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, text), (nats, greedy) in zip(pairs, found, strict=True):
        ids = naive.encode(context + text)[-21:]
        expected, expected_greedy = naive.score(ids, len(text))
        assert nats == pytest.approx(expected, rel=1e-5)
        assert greedy == expected_greedy
    assert "of 1 of 3 contexts the first tokens are dropped, 15 at most" in log.text

    prompt = "the beginning of a long context"
    asked = requests("generate_until", (prompt, {"until": ["\n"], "max_gen_toks": 6}))
    (text,) = model.generate_until(asked, disable_tqdm=True)
    assert text == naive.write(naive.encode(prompt)[-14:], ["\n"], 6)
    assert "of 1 of 1 contexts the first tokens are dropped, 18 at most" in log.text
    with pytest.raises(ConfigError, match="max_length=20; expected more than max_gen_toks=20"):
        model.generate_until(requests("generate_until", ("a", {"max_gen_toks": 20})))
    with pytest.raises(ConfigError, match="max_length=20; expected at least 21"):
        model.loglikelihood(requests("loglikelihood", ("a", "b" * 21)))


def test_documents_beyond_the_maximum_are_read_in_pieces(run, log):
    model, naive = SparseKLM(run.workdir, batch_size=2, max_length=20), Naive(run.workdir)
    texts = ["x" * 5, "abcdefgh " * 5, ""]
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    found = model.loglikelihood_rolling(asked, disable_tqdm=True)
    ids = naive.encode(texts[1])  # bos and 45 bytes: 20, 20 and 5 are predicted, from 20 each
    pieces = [(ids[:21], 20), (ids[20:41], 20), (ids[25:46], 5)]
    expected = sum(naive.score(*piece)[0] for piece in pieces)
    assert found == pytest.approx([naive.continuation("", texts[0])[0], expected, 0], rel=1e-5)
    assert "3 texts are read in 4 pieces" in log.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size='auto'; expected an integer of at least 1"),
        ({"max_length": 0}, "max_length=0; expected at least 1"),
        ({"num_heads": 2}, "num_heads=2 is not an argument"),
    ],
)
def test_impossible_arguments_are_refused(run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        SparseKLM(run.workdir, **arguments)


def test_generation_that_cannot_be_done_is_refused(run):
    asked = requests("generate_until", ("a", {"until": "\n", "num_beams": 4}))
    with pytest.raises(ConfigError, match="generation_kwargs has num_beams=4"):
        SparseKLM(run.workdir).generate_until(asked)
