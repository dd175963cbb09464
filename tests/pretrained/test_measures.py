"""The benchmarks that measure nats of text files by an imported model."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import selections
from sparsek_jax.pretrained.families import AttentionOptions
from sparsek_jax.pretrained.importing import import_model
from tests.pretrained import models


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A directory with a dense import `run` and the texts `a/0`, `a/1` and `b/0`."""
    directory = tmp_path_factory.mktemp("measures")
    options = AttentionOptions(kind="dense")
    import_model(models.source(directory, "llama3"), directory / "run", options=options)
    rng = np.random.default_rng(0)
    for name in ("a/0", "a/1", "b/0"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(" ".join(f"w{i}" for i in rng.integers(2, 48, 80)))
    return directory


def measure(benchmark, directory, *flags):
    """The output of a benchmark of `run` and the texts."""
    texts = [str(directory / name) for name in ("a/0", "a/1", "b/0")]
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", f"--workdir={directory}/run"]
    result = subprocess.run([*command, *flags, *texts], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_text_nats_by_file_and_position(dense, tmp_path):
    flags = ("--tokens=32", "--pieces=2", "--buckets=4", f"--to={tmp_path}/nats.json")
    out = measure("text_nats", dense, *flags)
    assert "62 tokens: " in out
    assert "124 tokens: " in out
    record = json.loads((tmp_path / "nats.json").read_text())
    assert record["edges"] == [0, 8, 16, 24, 32]
    assert [file["pieces"] for file in record["files"]] == [2, 2, 2]
    # Of random words nothing can be predicted by a random model.
    np.testing.assert_allclose([file["nats"] for file in record["files"]], np.log(48), atol=1.5)


def test_copied_tokens_by_how_far_back_they_stand(dense):
    flags = (f"--base={dense}/run", "--tokens=64", "--from_position=8", "--edges=4,16")
    rows = measure("copied_tokens", dense, *flags).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| not before",
        "| at most 4 back",
        "| 5 to 16 back",
        "| 17 back or more",
        "| all",
    ]
    assert rows[-1].split(" | ")[3] == "+0.000"


def test_hindsight_is_dense_while_all_keys_are_kept(dense):
    flags = ("--tokens=32", "--num_selected=24", "--sliding_window=8")
    rows = measure("hindsight", dense, *flags).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        f"| {name}" for name in ("dense", "query", "foresight", "hindsight")
    ]
    assert {row.split(" | ")[-1].strip("+-| ") for row in rows[2:]} == {"0.00%"}


def heads(length, num_heads, num_kv_heads, head_dim=8):
    rng = np.random.default_rng(1)
    shapes = ((length, n, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads))
    return [2 * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def naive_attention(query, key):
    """Dense causal attention, `[K, G, T, T]`."""
    length, num_kv_heads = key.shape[:2]
    grouped = query.reshape(length, num_kv_heads, -1, query.shape[-1])
    logits = np.einsum("tkgh,skh->kgts", grouped, key) / np.sqrt(query.shape[-1])
    logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_contexts_of_runs_beside_each_other(tmp_path):
    nats = {"one_0": (2.0, 3.0, 1.0), "one_1": (4.0, 5.0, 3.0), "two_0": (2.25, 3.5, 1.0)}
    for name, (mean, *by_context) in nats.items():
        spans = zip((0, 8), (8, 16), by_context, strict=True)
        buckets = [{"start": a, "stop": b, "nats_per_token": x} for a, b, x in spans]
        record = {"loss": {"nats_per_token": mean, "buckets": buckets}}
        (tmp_path / name).write_text(json.dumps(record))
    command = [sys.executable, "-m", "benchmarks.context_plot", f"--to={tmp_path}/plot.png"]
    models = [f"one={tmp_path}/one_0,{tmp_path}/one_1", f"a = b={tmp_path}/two_0"]
    result = subprocess.run([*command, *models], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| one | 3.000 | 2.000, 4.000 | 4.000 | 2.000 |" in result.stdout
    assert "| a = b | 2.250 (-25.0%) | 2.250 | 3.500 | 1.000 |" in result.stdout
    assert (tmp_path / "plot.png").stat().st_size > 1000
    result = subprocess.run([*command, models[0]], capture_output=True, text=True)
    assert "1 models; expected two or more" in result.stderr + result.stdout


@pytest.mark.parametrize("kept", [selections.kept_by_query, selections.kept_by_foresight])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_kept_keys_are_those_with_most_attention(kept, num_kv_heads, monkeypatch):
    length, chunk, k, w = 43, 8, 5, 6
    monkeypatch.setattr(selections, "_CHUNK", chunk)
    query, key, value = heads(length, 4, num_kv_heads)
    out = jax.jit(
        selections.kept_attention,
        static_argnums=3,
        static_argnames=("num_selected", "sliding_window"),
    )(query, key, value, kept, num_selected=k, sliding_window=w)
    weights = naive_attention(query, key)
    distance = np.arange(length)[:, None] - np.arange(length)
    far = np.where(distance >= w, weights, 0).mean(1)
    expected = np.zeros((length, num_kv_heads, 4 // num_kv_heads, query.shape[-1]))
    for t in range(length):
        first = t // chunk * chunk
        last = min(first + chunk, length) - 1
        for head in range(num_kv_heads):
            found = far[head, t] if kept is selections.kept_by_query else far[head, first:].sum(0)
            found = np.where(np.arange(length) <= last - w, found, 0)
            best = [j for j in np.argsort(-found)[:k] if found[j] > 0 and distance[t, j] >= w]
            seen = [*best, *range(max(0, t - w + 1), t + 1)]
            share = weights[head, :, t][:, seen]
            share /= share.sum(-1, keepdims=True)
            expected[t, head] = share @ value[seen, head]
    np.testing.assert_allclose(out, expected.reshape(out.shape), atol=1e-5)


def test_hindsight_scores_rank_keys_by_the_attention_to_come():
    query, key, _ = heads(64, 2, 1)
    query[8:] = 3 * key[5]  # Later queries look for this key.
    scores = selections.hindsight_scores(query, key, num_selected=4, sliding_window=4, num_sinks=0)
    assert scores.shape == (1, 64, 1)
    assert scores[0, :60, 0].argmax() == 5
