"""Rows of recall through training, resume and evaluation, as users run them."""

import json

import pytest

from sparsek_jax.evaluation.evaluate import evaluate
from sparsek_jax.evaluation.page import make_page
from sparsek_jax.evaluation.report import print_report, write_report
from sparsek_jax.training.config import default_config
from sparsek_jax.training.trainer import train


def recall_config(steps):
    """One pair, and behind it its key: learned in some dozen steps."""
    config = default_config()
    config.model.update(num_layers=1, d_model=32, mlp_dim=32, tie_embeddings=False)
    config.attention.update(num_heads=2, num_kv_heads=2, head_dim=16, sliding_window=2)
    config.attention.num_selected = 4
    config.data.update(tokenizer="ids:9", seq_len=4)
    config.data.recall.update(num_pairs=1, num_fillers=1, validation_rows=50)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=2)
    config.train.update(steps=steps, batch_size=32, eval_every=0, checkpoint_every=40, log_every=40)
    config.train.eval_batches = 0
    config.eval.batch_size = 16
    return config


def test_recall_is_learned_resumed_and_evaluated(tmp_path, capsys):
    train(recall_config(40), tmp_path)
    train(recall_config(80), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (accuracy,) = [
        record["validation_accuracy"]
        for record in map(json.loads, lines)
        if record["step"] == 80 and "validation_accuracy" in record
    ]
    # Of four values, one by guessing.
    assert accuracy > 0.9
    evaluation = evaluate(recall_config(80), tmp_path)
    loss = evaluation.loss
    assert (loss.documents, loss.tokens, loss.bytes) == (50, 50, 0)
    assert loss.accuracy == pytest.approx(accuracy)
    assert evaluation.corpus == "associative recall, num_pairs=1 in rows of 4 tokens"
    json_path, png_path = write_report(evaluation)
    record = json.loads(json_path.read_text())["loss"]
    assert record["accuracy"] == loss.accuracy
    assert record["bits_per_byte"] is None
    assert png_path.stat().st_size > 1000
    capsys.readouterr()
    print_report(evaluation)
    assert f"{loss.accuracy:.1%}" in capsys.readouterr().out
    page = make_page([tmp_path])
    assert "<th>accuracy</th>" in page
    assert "bits per byte" not in page
    assert "not finite" not in page
