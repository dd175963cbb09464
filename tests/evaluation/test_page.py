"""The page of runs, from hand-made directories; one from a trained run."""

import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from sparsek_jax.evaluation.evaluate import Evaluation
from sparsek_jax.evaluation.gates import LayerGates
from sparsek_jax.evaluation.page import make_page, write_page
from sparsek_jax.evaluation.page import page as page_module
from sparsek_jax.evaluation.page.charts import NUM_COLOURS, Series, line_chart, style_of
from sparsek_jax.evaluation.page.entries import make_entries
from sparsek_jax.evaluation.page.records import read_record
from sparsek_jax.evaluation.perplexity import Bucket, HeldOutLoss
from sparsek_jax.evaluation.report import to_json
from sparsek_jax.evaluation.tasks.evaluate import TaskEvaluation
from sparsek_jax.evaluation.tasks.grid import Cell
from sparsek_jax.evaluation.tasks.report import task_to_json
from sparsek_jax.training.config import ConfigError, decoder_config, default_config

NASTY = "a<b>&\"'</script><script>alert(1)</script>"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


class Run:
    """A directory with what a run of 27,000 parameters would leave."""

    def __init__(self, directory, kind="sparsek", seed=0, **fields):
        self.directory, self.kind = directory, kind
        config = default_config()
        config.model.update(num_layers=2, d_model=32, mlp_dim=64)
        config.attention.update(kind=kind, num_heads=4, num_kv_heads=2, head_dim=8)
        config.attention.update(num_selected=8, sliding_window=16)
        config.data.update(seq_len=64, tokenizer="bytes")
        config.train.batch_size = 8
        config.seed = seed
        for name, value in fields.items():
            section, _, field = name.partition("__")
            config[section][field] = value
        self.config = json.loads(config.to_json())
        write(directory / "config.json", self.config)
        write(directory / "run.json", {"corpus": "glob-1", "tokenizer": "bytes"})

    def metrics(self, losses, every=1):
        lines = [{"step": i * every, "loss": loss} for i, loss in enumerate(losses, 1)]
        lines.append({"step": len(losses) * every, "validation_loss": losses[-1]})
        write(self.directory / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        return self

    def common(self, label, **more):
        """What evaluations of held-out text and of tasks have in common."""
        config = ml_collections.ConfigDict(json.loads(json.dumps(self.config)))
        config.attention.kind = label or self.kind
        return {
            "workdir": self.directory,
            "step": 3,
            "label": label or self.kind,
            "notes": (),
            "attention": decoder_config(config, 258).attention,
            "config": config,
        } | more

    def held_out(self, nats, *, label="", corpus="texts", tokens=100, seq_len=64, **more):
        """Files as eval.py writes them; two heads a layer."""
        spans = ((0, 1), (1, 32), (32, 64))
        layer = LayerGates(
            layer=0,
            queries=5,
            kept_mass=np.array([0.5, math.nan]),
            support=np.array([9.0, 11.0]),
            saturation=np.array([0.25, 0.75]),
            interior=np.array([0.5, 0.5]),
            score_std=np.array([1.0, 3.0]),
            verdicts=("alive", "saturated"),
        )
        num_layers = 2 if self.kind == "sparsek" else 0
        evaluation = Evaluation(
            **self.common(label, **more),
            corpus=corpus,
            loss=HeldOutLoss(
                documents=2,
                tokens=tokens,
                bytes=tokens,
                nats_per_token=nats,
                standard_error=0.25,
                perplexity=math.exp(nats),
                bits_per_byte=nats / math.log(2),
                buckets=tuple(Bucket(*span, 10, nats, math.nan) for span in spans),
            ),
            gates=tuple(dataclasses.replace(layer, layer=i) for i in range(num_layers)),
        )
        evaluation.config.data.seq_len = seq_len
        write(self.directory / "eval" / f"{evaluation.label}.json", to_json(evaluation))
        return self

    def task(self, accuracies, *, label="", depths=(0.0, 1.0), measure="answered exactly"):
        """Accuracies of passkey by length, the same at every depth."""
        evaluation = TaskEvaluation(
            **self.common(label),
            task="passkey",
            measure=measure,
            cells=tuple(
                Cell(length, depth, 4, length - 1.0, 1, accuracy, 1.5)
                for length, accuracy in accuracies.items()
                for depth in depths
            ),
        )
        path = self.directory / "eval" / f"{evaluation.label}.passkey.json"
        write(path, task_to_json(evaluation))
        return self

    def nats(self, values, name="nats.json", file="/texts/books/a.txt"):
        edges = np.linspace(0, 64, len(values) + 1).astype(int).tolist()
        files = [{"file": file, "pieces": 3, "nats": values}, {"file": "/texts/code/b.py"}]
        files[1] |= {"pieces": 1, "nats": [value + 1 for value in values]}
        write(self.directory / name, {"step": 3, "edges": edges, "files": files})
        return self


class Parsed(html.parser.HTMLParser):
    """Rows of tables as text, the text of all, and the tags."""

    def __init__(self, source):
        super().__init__()
        self.rows, self.text, self.tags = [], "", []
        self._skipped, self._in_cell = 0, False
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skipped += tag in ("style", "script")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        if tag == "b" and ("class", "best") in attrs:
            self.handle_data("*")

    def handle_endtag(self, tag):
        self._skipped -= tag in ("style", "script")
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if self._skipped:
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def runs(self):
        """The first table: by run, cells by column."""
        head = self.rows[0]
        others = (i for i, row in enumerate(self.rows) if len(row) != len(head))
        rows = self.rows[1 : next(others, None)]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def parsed(*runs, **options):
    return Parsed(make_page([run.directory for run in runs], **options))


def test_the_table_tells_runs_and_their_best(tmp_path):
    sparsek = Run(tmp_path / "s").metrics([4, 3, 2]).held_out(2.0).task({32: 0.5, 64: 1.0})
    dense = Run(tmp_path / "d", "dense").metrics([4, 3, 3]).held_out(2.5).task({32: 1.0, 64: 1.0})
    page = parsed(sparsek, dense)
    rows = page.runs()
    assert list(rows) == ["s", "d"]
    assert rows["s"] == {
        "run": "s",
        "attention": "sparsek",
        "k": "8",
        "w": "16",
        "parameters": "26,980",
        "steps": "3",
        "tokens read": "1,536",
        "nats per token": "*2.0000 ± 0.2500",
        "bits per byte": "*2.8854",
        "passkey": "75.0%",
    }
    assert rows["d"]["k"] == rows["d"]["w"] == "-"
    assert rows["d"]["parameters"] == "26,848"
    assert rows["d"]["nats per token"] == "2.5000 ± 0.2500"
    assert rows["d"]["passkey"] == "*100.0%"
    assert "cannot be compared" not in page.text
    assert "nats of text files" in page.text  # what is missing


def test_runs_of_several_seeds_are_one_row(tmp_path):
    runs = [
        Run(tmp_path / f"s{seed}", seed=seed)
        .metrics([4, 3, 2 + seed])
        .held_out(2.0 + seed)
        .task({32: seed / 2})
        .nats([2.0 + seed, 3.0])
        for seed in range(3)
    ]
    page = parsed(*runs, Run(tmp_path / "other", train__batch_size=4).held_out(2.5))
    rows = page.runs()
    assert list(rows) == ["s0, s1, s2", "other"]
    seeds = rows["s0, s1, s2"]
    assert seeds["seeds"] == "3"
    assert seeds["nats per token"] == "3.0000 ± 1.0000"  # a sample's deviation
    assert seeds["passkey"] == "50.0% ± 50.0%"
    assert "4 alive 4 saturated" not in page.text
    assert "3 alive 3 saturated" in page.text  # heads of all seeds
    entry, _ = make_entries([read_record(p) for p in sorted(tmp_path.iterdir(), reverse=True)])
    steps, mean, deviation = entry.curve("loss")
    assert steps.tolist() == [1, 2, 3]
    assert mean.tolist() == [4, 3, 3]
    assert deviation.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.metrics([4, 3]),  # stopped earlier
        lambda run: run.held_out(2.0, tokens=50),
        lambda run: run.held_out(2.0, step=2),
        lambda run: run.task({64: 0.5}),
        lambda run: Run(run.directory).held_out(2.0),  # the same seed twice
        lambda run: Run(run.directory, seed=1, optimizer__b1=0.8).held_out(2.0),
    ],
)
def test_what_differs_in_more_than_the_seed_is_not_averaged(tmp_path, change):
    first, second = (
        Run(tmp_path / f"s{seed}", seed=seed).metrics([4, 3, 2]).held_out(2.0).task({32: 0.5})
        for seed in (0, 1)
    )
    assert list(parsed(first, second).runs()) == ["s0, s1"]
    change(second)
    assert list(parsed(first, second).runs()) == ["s0", "s1"]


def test_different_evaluations_are_marked_and_do_not_compete(tmp_path):
    runs = [
        Run(tmp_path / "a").held_out(2.0).task({32: 0.5}),
        Run(tmp_path / "b", "window").held_out(1.0, seq_len=32).task({32: 0.25}),
        Run(tmp_path / "c", "dense").held_out(2.5),
        Run(tmp_path / "d", "sinks").held_out(1.5, corpus="others").task({32: 1.0}, depths=(0.5,)),
    ]
    page = parsed(*runs)
    rows = page.runs()
    assert [row["nats per token"] for row in rows.values()] == [
        "*2.0000 ± 0.2500a",
        "1.0000 ± 0.2500b",
        "2.5000 ± 0.2500a",
        "1.5000 ± 0.2500c",
    ]
    assert [row["passkey"] for row in rows.values()] == ["*50.0%d", "25.0%d", "-", "100.0%e"]
    assert "cannot be compared" in page.text
    assert "seq_len 32" in page.text
    assert page.text.count("Held-out loss by context") == 3  # a chart for each


def test_a_run_evaluated_with_another_attention_has_a_row_for_it(tmp_path):
    run = Run(tmp_path / "s").metrics([4, 3, 2]).held_out(2.0)
    run.held_out(3.0, label="window", notes=["attention.kind='window'; trained with 'sparsek'."])
    rows = (page := parsed(run)).runs()
    assert list(rows) == ["s", "s as window"]
    assert rows["s as window"]["attention"] == "window"
    assert rows["s as window"]["k"] == "-"
    assert "s as window: attention.kind='window'; trained with 'sparsek'." in page.text
    assert "1 run of sparsek_jax" in page.text


def test_results_of_another_step_are_noted(tmp_path):
    run = Run(tmp_path / "s").held_out(2.0, step=7).task({32: 0.5}).nats([2.0, 4.0])
    page = parsed(run)
    assert page.runs()["s"]["steps"] == "7"
    assert "s: Of another step, 3: tasks or text files." in page.text


def test_text_files_by_kind_and_position(tmp_path):
    page = parsed(
        Run(tmp_path / "a").nats([2.0, 4.0]), Run(tmp_path / "b", "dense").nats([1.0, 9.0])
    )
    row = next(row for row in page.rows if row[:1] == ["run"] and "books" in row)
    at = page.rows.index(row)
    # 32 targets in the first bucket and 31 in the last, whose last token has none.
    mean = (32 * 2 + 31 * 4) / 63
    assert row == ["run", "books", "code"]
    assert page.rows[at + 1] == ["a", f"*{mean:.4f}", f"*{mean + 1:.4f}"]
    other = Run(tmp_path / "c", "window").nats([1.0, 1.0], file="/texts/books/c.txt")
    page = parsed(*(Run(tmp_path / n, k) for n, k in (("a", "sparsek"), ("b", "dense"))), other)
    assert sum(row == ["run", "books", "code"] for row in page.rows) == 2  # not beside each other


def test_an_import_or_a_run_without_anything_is_shown_with_what_is_missing(tmp_path):
    run = Run(tmp_path / "new")
    imported = Run(tmp_path / "imported", data__tokenizer="tokenizer.json")
    write(imported.directory / "run.json", {"imported": {"family": "llama"}, "tokenizer": "x"})
    page = parsed(run, imported)
    rows = page.runs()
    assert (
        rows["new"]["steps"] == rows["new"]["tokens read"] == rows["new"]["nats per token"] == "-"
    )
    assert rows["imported"]["parameters"] == "-"
    assert "new: Missing: training curves (metrics.jsonl)." in page.text
    assert "new, imported: Missing: held-out loss (eval.py)." in page.text
    assert "imported: Missing: number of parameters, as the tokenizer is gone." in page.text


def test_a_loss_that_is_not_finite_is_told_and_is_not_best(tmp_path):
    rows = parsed(
        Run(tmp_path / "a").held_out(math.nan), Run(tmp_path / "b", "dense").held_out(2)
    ).runs()
    assert [row["nats per token"] for row in rows.values()] == ["not finite", "2.0000 ± 0.2500"]


def test_names_and_texts_are_escaped_and_nothing_is_loaded(tmp_path):
    run = Run(tmp_path / NASTY.replace("/", "_")).metrics([4, 3, 2]).nats([1.0, 2.0])
    run.held_out(2.0, corpus=NASTY, notes=[NASTY]).task({32: 0.5}, measure=NASTY)
    source = make_page([run.directory])
    page = Parsed(source)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.text.count(NASTY) >= 3
    urls = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert urls == ["data:,"]
    assert not re.search(r"https?://|@import|url\(", source)
    assert "__BODY__" not in source


def test_names_of_two_directories_that_end_alike_are_told_in_full(tmp_path):
    runs = [
        Run(tmp_path / x / "run", kind).held_out(2.0)
        for x, kind in (("a", "dense"), ("b", "window"))
    ]
    assert list(parsed(*runs).runs()) == [str(run.directory) for run in runs]
    assert list(parsed(runs[0], runs[0]).runs()) == ["run"]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("config.json", "{", r"config\.json is damaged"),
        ("config.json", "{}", r"config\.json is no configuration of a run"),
        ("eval/sparsek.json", '{"loss"', r"sparsek\.json is damaged .*; expected it to be removed"),
        ("eval/sparsek.json", "[]", r"sparsek\.json is damaged \(no JSON object\)"),
        ("eval/sparsek.json", '{"loss": {}}', r"sparsek\.json is damaged, or from another version"),
        ("eval/a.passkey.json", '{"cells": []}', r"a\.passkey\.json is damaged"),
        ("nats.json", '{"step": 1, "edges": [0], "files": [{}]}', r"nats\.json is damaged"),
        ("metrics.jsonl", '{"step": 1\n{"step": 2, "loss": 1}\n', r"line 1 of .*metrics\.jsonl"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path, path, content, message):
    run = Run(tmp_path / "run").metrics([4, 3, 2]).held_out(2.0)
    write(run.directory / path, content)
    with pytest.raises(ConfigError, match=message) as error:
        write_page([run.directory], tmp_path / "page.html")
    assert "\n" not in str(error.value)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["run"]


def test_the_cut_off_line_of_a_killed_run_and_foreign_files_are_left_out(tmp_path):
    run = Run(tmp_path / "run").metrics([4, 3, 2])
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write(run.directory / "eval" / "mine.json", {"x": 1})
    write(run.directory / "eval" / ".sparsek.json.7", "{")
    page = parsed(run)
    assert page.runs()["run"]["steps"] == "3"
    assert "run: Left out: the last line of metrics.jsonl, which is not whole." in page.text
    assert "run: Left out: eval/mine.json, which is no evaluation." in page.text


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    run = Run(tmp_path / "run").held_out(2.0)
    to = tmp_path / "page.html"
    to.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_page([run.directory], to)
    assert to.read_text() == "old"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["page.html", "run"]


def test_mistakes_are_refused(tmp_path):
    run = Run(tmp_path / "run")
    with pytest.raises(ConfigError, match="no run is named"):
        make_page([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty' holds no run \(no config\.json\)"):
        make_page([run.directory, tmp_path / "empty"])
    with pytest.raises(ConfigError, match="--to="):
        write_page([run.directory], tmp_path / "nowhere" / "page.html")
    with pytest.raises(ConfigError, match="--to="):
        write_page([run.directory], tmp_path)
    with pytest.raises(ConfigError, match="--text="):
        write_page([run.directory], tmp_path / "page.html", text=tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="expected UTF-8"):
        write_page([run.directory], tmp_path / "page.html", text=tmp_path / "bytes.txt")


def test_a_text_without_a_checkpoint_to_read_it_is_left_out(tmp_path):
    runs = Run(tmp_path / "a").held_out(2.0), Run(tmp_path / "b", "dense").held_out(2.0)
    runs[0].held_out(3.0, label="window")
    page = parsed(*runs, text="some text")
    assert re.search("a: left out, .* holds no checkpoint", page.text)
    assert page.text.count("left out") == 2  # not once more as window
    assert "b: left out, no layer of dense has a scorer" in page.text


def test_charts_leave_gaps_and_cut_off_what_is_beyond_the_axis():
    nan = math.nan
    series = Series(0, "a&b", np.arange(5.0), np.array([1, 2, nan, 3, 900]), np.full(5, nan))
    chart = line_chart([series], title="t", xlabel="x", ylabel="y", y_range=(0.0, 4.0))
    assert chart.count("<polyline") == 2
    assert chart.count("<circle") == 4
    assert "a&amp;b" in chart
    assert "a&b" not in chart
    assert "nan" not in chart
    steps = np.arange(5000.0)
    long = Series(1, "long", steps, steps % 7, np.full(5000, nan))
    chart = line_chart([long], title="t", xlabel="x", ylabel="y")
    assert chart.count(",") < 1000
    constant = Series(2, "flat", np.arange(2.0), np.ones(2), np.zeros(2))
    assert "nan" not in line_chart([constant], title="t", xlabel="x", ylabel="y")


def test_colours_repeat_with_dashes():
    assert [style_of(i) for i in (0, NUM_COLOURS, 2 * NUM_COLOURS + 1)] == ["c0", "c0 d1", "c1 d2"]
    template = page_module._TEMPLATE.read_text()
    assert all(f".c{i} {{" in template for i in range(NUM_COLOURS))


@pytest.mark.parametrize("module", ["page", "report"])
def test_the_command_writes_the_page_or_one_line(tmp_path, module):
    run = Run(tmp_path / "run").held_out(2.0)
    command = [sys.executable, "-m", f"sparsek_jax.evaluation.{module}"]

    def call(*arguments):
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)

    to = tmp_path / "page.html"
    done = call(str(run.directory), f"--to={to}")
    assert done.stdout == f"wrote {to}\n"
    assert "2.0000" in to.read_text()
    if module == "page":
        failed = call(f"--to={to}")
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: no run is named")
        assert failed.stderr.count("\n") == 1


def test_a_trained_run_and_what_it_selected(run, tmp_path):
    text = tmp_path / "sample.txt"
    text.write_text("<b>abc</b> & defg\n" * 4)
    write_page([run.workdir], tmp_path / "page.html", text=text, max_tokens=50)
    page = Parsed((tmp_path / "page.html").read_text())
    assert page.runs()["workdir"]["steps"] == "2"
    assert "Training loss" in page.text
    assert "the first 50 of 73 tokens" in page.text
    # k = 4 keys of the one head in each of two layers.
    survivors = [row for row in page.rows if len(row) == 3 and row[0] in ("0", "1")][-2:]
    assert [len(row[2].split(" ")) for row in survivors] == [4, 4]
    (frame,) = (attributes for tag, attributes in page.tags if tag == "iframe")
    assert "<title>workdir, step 2</title>" in frame["srcdoc"]
    assert "<b>abc" not in frame["srcdoc"]
