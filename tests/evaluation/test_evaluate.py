import contextlib
import dataclasses
import io
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.data import prepare, validation_batches
from sparsek_jax.data.lanes import LaneValidation
from sparsek_jax.evaluation.evaluate import evaluate
from sparsek_jax.evaluation.report import to_json
from sparsek_jax.generation.engine import Engine
from sparsek_jax.generation.loading import load_run
from sparsek_jax.training.config import ConfigError
from sparsek_jax.training.trainer import train


def expected(run, model):
    """Loss of every held-out target and its context, by whole logits in float64."""
    losses, contexts, num_bytes = [], [], 0
    for batch in validation_batches(run.result.corpus, run.config.data, batch_size=3):
        logits = model(batch["inputs"], segment_ids=jnp.asarray(batch["segment_ids"]))
        logits = np.asarray(logits, np.float64)
        top = logits.max(-1, keepdims=True)
        normaliser = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
        target = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        counted = batch["loss_mask"] > 0
        losses.append((normaliser - target)[counted])
        contexts.append(batch["positions"][counted])
        num_bytes += int((batch["targets"][counted] < 256).sum())
    return np.concatenate(losses), np.concatenate(contexts), num_bytes


def check_loss(loss, losses, contexts, num_bytes):
    assert (loss.tokens, loss.bytes) == (len(losses), num_bytes)
    assert loss.nats_per_token == pytest.approx(losses.mean(), rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert loss.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / num_bytes, rel=1e-5)
    assert [b.start for b in loss.buckets] == [0, 8, 16]
    for bucket in loss.buckets:
        inside = (contexts >= bucket.start) & (contexts < bucket.stop)
        assert bucket.tokens == inside.sum()
        assert bucket.nats_per_token == pytest.approx(losses[inside].mean(), rel=1e-5)


@pytest.fixture(scope="module")
def plain(run):
    """The run's evaluation without overrides."""
    return evaluate(run.config, run.workdir)


def test_loss_equals_that_of_whole_logits(run, plain):
    evaluation = plain
    check_loss(evaluation.loss, *expected(run, run.result.model))
    assert (evaluation.step, evaluation.label, evaluation.notes) == (2, "sparsek", ())
    assert evaluation.loss.documents == len(run.result.corpus.validation)
    assert [layer.layer for layer in evaluation.gates] == [0, 1]
    for layer in evaluation.gates:
        assert layer.queries > 0
        assert 0 < layer.kept_mass[0] <= 1
        assert layer.support[0] >= 4


def test_same_weights_with_dense_attention(run, plain):
    """k + w covers the row, so that SparseK is dense attention: the same loss by another path."""
    dense, all_kept = run.config.copy_and_resolve_references(), None
    dense.attention.kind = "dense"
    evaluation = evaluate(dense, run.workdir, overrides=["attention.kind"])
    all_kept = run.config.copy_and_resolve_references()
    all_kept.attention.num_selected = 40
    covered = evaluate(all_kept, run.workdir, overrides=["attention.num_selected"])
    assert evaluation.loss.nats_per_token == pytest.approx(covered.loss.nats_per_token, rel=1e-5)
    assert evaluation.loss.nats_per_token != plain.loss.nats_per_token
    assert evaluation.gates == ()
    assert evaluation.label == "dense"
    assert evaluation.notes == ("attention.kind='dense'; the weights were trained with 'sparsek'.",)
    assert covered.gates[0].verdicts == ("unused",)
    sinks = dataclasses.replace(plain.attention, kind="sinks", num_selected=4, sliding_window=9)
    described = to_json(dataclasses.replace(evaluation, attention=sinks))["attention"]
    assert (described, to_json(evaluation)["attention"]) == ("sinks k=4 w=9", "dense")
    sizes = {"num_selected": 4, "sliding_window": 8, "block_size": 6}
    blocks = dataclasses.replace(sinks, pattern=("moba", "gated_linear"), **sizes)
    described = to_json(dataclasses.replace(evaluation, attention=blocks))["attention"]
    assert described == "moba+gated_linear k=4 w=8 block=6"


def test_a_run_of_sparsek_beside_linear_attention(tmp_path, run):
    """Its scorers are judged and its text goes on, as those of a SparseK run."""
    config = run.config.copy_and_resolve_references()
    config.attention.update(kind="sparsek_linear", gating="straight_through")
    config.model.scan_layers = True
    with contextlib.redirect_stdout(io.StringIO()):
        train(config, tmp_path)
    evaluation = evaluate(config, tmp_path)
    assert [layer.layer for layer in evaluation.gates] == [0, 1]
    assert math.isfinite(evaluation.loss.nats_per_token)
    described = to_json(evaluation)["attention"]
    assert described == "sparsek_linear k=4 w=3 straight_through"
    config.attention.kind = "sparsek"
    with pytest.raises(ConfigError, match=r"attention\.gates\.kernel of .* has no place"):
        evaluate(config, tmp_path, overrides=["attention.kind"])
    loaded = load_run(tmp_path)
    engine = Engine(loaded.model, loaded.tokenizer, chunk_sizes=(8, 8), block_size=8)
    (text,) = engine.generate(["abc"], max_tokens=20)
    assert text.num_tokens > 0


def test_fewer_batches_and_another_batch_size(run, plain):
    config = run.config.copy_and_resolve_references()
    config.eval.batch_size = 3
    config.eval.position_edges = (5, 20, 64)
    evaluation = evaluate(config, run.workdir)
    assert [(b.start, b.stop) for b in evaluation.loss.buckets] == [(0, 5), (5, 20), (20, 32)]
    assert evaluation.loss.nats_per_token == pytest.approx(plain.loss.nats_per_token, rel=1e-6)
    config.eval.batches = 1
    evaluation = evaluate(config, run.workdir)
    assert evaluation.loss.tokens == 3 * 32
    assert any("only the first of" in note for note in evaluation.notes)


@pytest.mark.parametrize("recurrent", [True, False])
def test_loss_by_position_in_documents_longer_than_rows(run, recurrent):
    """With memory, of whole documents; without, of rows that begin anew."""
    config = run.config.copy_and_resolve_references()
    config.eval.position_edges = (16, 32, 64, 128)
    config.train.recurrent, config.eval.by_document = recurrent, not recurrent
    evaluation = evaluate(config, run.workdir, overrides=["train.recurrent"])
    whole = nnx.jit(lambda model, inputs: model(inputs))
    longest, sums, counts = 0, np.zeros(5), np.zeros(5, int)
    for i in range(len(run.result.corpus.validation)):
        tokens = run.result.corpus.validation[i]["tokens"]
        longest = max(longest, len(tokens) + 1)
        size = len(tokens) + 1 if recurrent else config.data.seq_len
        pieces = documents_in_lanes(run, i, size, config)
        for inputs, targets, positions in pieces:
            # Causal, so that what is behind does not matter: one program for all sizes.
            padded = np.pad(inputs, (0, 300 - len(inputs)))[None]
            logits = np.asarray(whole(run.result.model, padded), np.float64)[0, : len(inputs)]
            normaliser = np.log(np.exp(logits).sum(-1))
            nats = normaliser - logits[np.arange(len(targets)), targets]
            bucket = np.searchsorted((16, 32, 64, 128), positions, side="right")
            sums += np.bincount(bucket, nats, 5)
            counts += np.bincount(bucket, minlength=5)
    buckets = evaluation.loss.buckets
    assert [b.start for b in buckets] == [0, 16, 32, 64, 128]
    assert buckets[-1].stop == longest
    assert [b.tokens for b in buckets] == counts.tolist()
    for bucket, expected in zip(buckets, sums / counts, strict=True):
        assert bucket.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert evaluation.label == ("sparsek_recurrent=True" if recurrent else "sparsek_by_document")
    assert evaluation.loss.bytes == run.result.corpus.num_validation_bytes
    assert bool(evaluation.gates) != recurrent


def documents_in_lanes(run, document, size, config):
    """Inputs, targets and positions of a document's parts in the rows of its lane."""
    corpus = run.result.corpus
    lanes = LaneValidation(corpus, config.data, batch_size=config.eval.batch_size)
    positions = np.concatenate(
        [batch["positions"][batch["document_ids"] == document] for batch in lanes]
    )
    rows = [np.sum(batch["document_ids"] == document) for batch in lanes]
    tokens = corpus.validation[document]["tokens"]
    inputs = np.array([corpus.tokenizer.bos_id, *tokens])
    targets = np.array([*tokens, corpus.tokenizer.eos_id])
    assert positions.tolist() == list(range(len(inputs)))
    borders = [0, len(inputs)] if size >= len(inputs) else np.cumsum([0, *rows])
    for start, stop in itertools.pairwise(borders):
        if start < stop:
            yield inputs[start:stop], targets[start:stop], np.arange(start, stop)


def test_what_cannot_be_read_by_document_is_refused(run):
    config = run.config.copy_and_resolve_references()
    config.eval.by_document, config.data.packing = True, "continuous"
    with pytest.raises(
        ConfigError, match=r"data\.packing='continuous' with eval\.by_document=True"
    ):
        evaluate(config, run.workdir, overrides=["data.packing"])


def test_other_text_is_read_with_the_run_s_tokenizer(tmp_path, run, plain):
    """The same text under another name gives the same documents, tokens and loss."""
    config = run.config.copy_and_resolve_references()
    source = tmp_path / "copy"
    source.mkdir()
    for path in sorted(run.workdir.parent.glob("text/*.txt")):
        (source / path.name).write_text(path.read_text())
    config.data.glob = str(source / "*.txt")
    evaluation = evaluate(config, run.workdir, overrides=["data.glob"])
    assert evaluation.loss == plain.loss
    assert evaluation.label == f"sparsek_{prepare(config.data).directory.name}"


def test_text_that_has_changed_is_refused(run):
    """Other documents would be held out: some that the run was trained on."""
    extra = run.workdir.parent / "text" / "99.txt"
    extra.write_text("one more document")
    try:
        with pytest.raises(ConfigError, match="files were changed, added or removed"):
            evaluate(run.config, run.workdir)
    finally:
        extra.unlink()


def test_errors_say_what_to_do(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="train"):
        evaluate(run.config, tmp_path / "none")
    other = run.config.copy_and_resolve_references()
    other.model.d_model = 32
    with pytest.raises(ConfigError, match=r"model\.d_model=32 \(the run: 16\)"):
        evaluate(other, run.workdir)
    with pytest.raises(FileNotFoundError, match="step=5"):
        evaluate(run.config, run.workdir, step=5)
    assert not (run.workdir / "eval").exists()
