"""What a user does to a run: starts it, stops it, kills it, resumes it, breaks its files."""

import dataclasses
import shutil
import signal
import subprocess

import numpy as np
import pytest
from flax import nnx

from sparsek_jax import nn
from sparsek_jax.training import signals
from sparsek_jax.training.checkpoint import restore_model, save_params
from sparsek_jax.training.config import ConfigError, decoder_config
from sparsek_jax.training.parameters import split
from sparsek_jax.training.workdir import check_same_run, load_config
from tests.training.helpers import (
    ROOT,
    command,
    environment,
    losses,
    run,
    start_two,
    write_corpus,
)

VOCAB = 258


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """An uninterrupted run of twelve steps, with checkpoints at 4, 8 and 12."""
    workdir = tmp_path_factory.mktemp("straight")
    result = run(workdir, corpus, "train.checkpoint_every=4", "train.eval_every=6")
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def weights(workdir, step=None, **attention):
    config = load_config(workdir)
    config.attention.update(attention)
    model, step = restore_model(workdir, decoder_config(config, VOCAB), step=step)
    return {name: np.asarray(x) for name, x in split(model)[1].items()}, step


def test_reports_what_it_runs_and_learns(straight):
    workdir, output = straight
    for text in ("jax 0.11", "documents", "parameters:", "num_selected"):
        assert text in output
    assert output.index("num_selected") < output.index("step 1/12")
    assert "tokens/s" in output
    assert "ETA" in output
    assert "held-out loss" in output
    by_step = losses(workdir)
    assert list(by_step) == list(range(1, 13))
    assert by_step[12] < by_step[1] - 0.5
    assert list((workdir / "tensorboard").glob("events.*"))


def test_kill_9_and_resume_is_bitwise_the_same(straight, corpus, tmp_path):
    arguments = ("train.checkpoint_every=4", "train.eval_every=6")
    with subprocess.Popen(
        command(tmp_path, corpus, *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("step 7/"):
                process.kill()
                break
    assert process.wait() == -signal.SIGKILL
    result = run(tmp_path, corpus, *arguments)
    assert result.returncode == 0, result.stderr
    assert "resuming from step 4" in result.stdout
    assert losses(tmp_path) == losses(straight[0])
    resumed, _ = weights(tmp_path)
    for name, expected in weights(straight[0])[0].items():
        np.testing.assert_array_equal(resumed[name], expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_cleanly(number, straight, corpus, tmp_path):
    arguments = ("train.checkpoint_every=400", "train.steps=12", "train.eval_every=6")
    with subprocess.Popen(
        command(tmp_path, corpus, *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("step 3/"):
                process.send_signal(number)
    assert process.returncode == 0
    assert f"by {number.name}" in output
    assert "The same command resumes" in output
    result = run(tmp_path, corpus, *arguments)
    assert result.returncode == 0, result.stderr
    assert "resuming from step" in result.stdout
    assert losses(tmp_path) == losses(straight[0])


@pytest.mark.parametrize("damage", ["truncate", "flip a bit"])
def test_damaged_newest_checkpoint_falls_back(damage, straight, corpus, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight[0], workdir)
    files = [p for p in (workdir / "checkpoints" / "12").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    if damage == "truncate":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert weights(workdir)[1] == 8
    result = run(workdir, corpus, "train.checkpoint_every=4", "train.eval_every=6")
    assert result.returncode == 0, result.stderr
    assert "the checkpoint of step 12" in result.stderr
    assert "resuming from step 8" in result.stdout
    assert losses(workdir) == losses(straight[0])
    assert weights(workdir)[1] == 12
    assert (workdir / "corrupt" / "12").is_dir()


def test_meshes_agree_and_checkpoints_move_between_them(corpus, tmp_path):
    arguments = ("train.steps=4", "optimizer.warmup_steps=1", "data.seq_len=32")
    shapes = {"one": (1, 1, 1), "cube": (2, 2, 2), "wide": (4, 2, 1)}

    def on_mesh(name, shape, *overrides):
        mesh = [f"mesh.{a}={n}" for a, n in zip(("data", "fsdp", "tensor"), shape, strict=True)]
        result = run(
            tmp_path / name, corpus, *arguments, *mesh, *overrides, devices=int(np.prod(shape))
        )
        assert result.returncode == 0, result.stderr
        return result

    for name, shape in shapes.items():
        on_mesh(name, shape)
    expected = list(losses(tmp_path / "one").values())
    for name in ("cube", "wide"):
        np.testing.assert_allclose(list(losses(tmp_path / name).values()), expected, atol=1e-5)
    result = on_mesh("wide", (2, 2, 1), "train.steps=6")
    assert "resuming from step 4" in result.stdout
    assert list(losses(tmp_path / "wide")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.stepz=3",
            "config.train.stepz is not a field of the configuration; did you mean "
            "config.train.steps?",
        ),
        (
            "data.recall.gapp=2",
            "config.data.recall.gapp is not a field of the configuration; did you mean "
            "config.data.recall.gap?",
        ),
        ("seed=-1", "seed=-1; expected an integer from 0"),
        ("attention.num_kv_heads=3", "attention.num_heads=4; expected a multiple"),
        (
            "attention.sliding_window=-1",
            "attention.sliding_window=-1; expected an int of",
        ),
        ("attention.num_selected=0", "attention.num_selected=0; expected an int of"),
        ("mesh.data=3", "mesh.data=3"),
        ("data.glob=/nowhere/*.txt", "/nowhere"),
        ("init_from=/nowhere", "init_from='/nowhere' holds neither a run nor an import"),
        (
            "attention.implementation=mosaic_gpu",
            "attention.implementation='mosaic_gpu' with model.dtype='float32': no kernels for cpu",
        ),
    ],
)
def test_mistakes_fail_before_anything_is_written(override, message, corpus, tmp_path):
    result = run(tmp_path / "run", corpus, override)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--wokdir=x", "Unknown command line flag 'wokdir'"),
        ("--config=configs/tiny_tst.py", "configs/tiny_tst.py"),
        ("--config=configs/of_run.py", "--config cannot be read: ValueError: expected a directory"),
        ("--config=configs/of_run.py:/nowhere", "workdir='/nowhere' holds no run"),
        ("--config.train.steps=abc", "config.train.steps"),
        ("--workdir=", "workdir"),
        ("texts/b.txt", "unexpected argument 'texts/b.txt'"),
        ("--process_id=1", "--process_id=1 without --distributed"),
        ("--num_processes=2", "--num_processes=2 without --distributed"),
        ("--coordinator=a:1", "--coordinator='a:1' without --distributed"),
    ],
)
def test_mistyped_commands_are_one_line(argument, message, corpus, tmp_path):
    result = subprocess.run(
        [*command(tmp_path / "run", corpus), argument],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file" / "run", corpus)
    assert result.returncode == 2
    assert f"workdir='{tmp_path}/file/run': Not a directory" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_model=64", "model.d_model=64, but the run in workdir="),
        ("data.recall.gap=2", "data.recall.gap=2, but the run in workdir="),
        ("train.steps=6", "already at step 12"),
    ],
)
def test_another_run_in_the_directory_is_refused_and_stays(override, message, straight, corpus):
    before = (straight[0] / "config.json").read_text()
    result = run(straight[0], corpus, override)
    assert result.returncode == 2
    assert message in result.stderr
    assert (straight[0] / "config.json").read_text() == before


def test_a_run_without_its_checkpoints_does_not_begin_anew(straight, corpus, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    for directory in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(directory)
    before = losses(tmp_path / "run")
    result = run(tmp_path / "run", corpus)
    assert result.returncode == 1
    assert "had checkpoints of the steps [4, 8, 12]" in result.stderr
    assert losses(tmp_path / "run") == before


def test_two_processes_train_stop_together_and_resume(corpus, tmp_path):
    arguments = ("train.steps=8", "optimizer.warmup_steps=1", "train.log_every=2")

    def start(*more, steps_to_signal=None, workdir=tmp_path / "run"):
        processes = start_two(workdir, corpus, *arguments, *more)
        output = ""
        for line in processes[0].stdout:
            output += line
            if steps_to_signal and line.startswith(f"step {steps_to_signal}/"):
                processes[1].send_signal(signal.SIGTERM)
        other, _ = processes[1].communicate()
        assert [process.wait() for process in processes] == [0, 0], output + other
        return output

    assert "sample at step 8" in start("sample.length=3", workdir=tmp_path / "straight")
    assert "stopped at step" in start(steps_to_signal=2)
    assert "resuming from step" in start()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    with pytest.raises(ConfigError, match="started with 2"):
        check_same_run(load_config(tmp_path / "run"), tmp_path / "run")


def test_a_signal_that_comes_while_processes_agree_waits_for_the_next_time(monkeypatch):
    stop = signals.Stop(every=2)

    def agree(asked):
        stop.name = "SIGTERM"
        return np.array([asked, False])

    monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.multihost_utils, "process_allgather", agree)
    assert [stop(step) for step in (2, 3, 4)] == [False, False, True]


def test_a_run_whose_text_has_changed_is_refused(straight, corpus):
    extra = corpus / "another.txt"
    extra.write_text("one more document")
    try:
        result = run(straight[0], corpus, "train.checkpoint_every=4", "train.eval_every=6")
    finally:
        extra.unlink()
    assert result.returncode == 2
    assert "files were changed, added or removed" in result.stderr


def test_restores_into_dense_attention_but_not_from_it(straight, corpus, tmp_path):
    sparse, _ = weights(straight[0])
    dense, _ = weights(straight[0], kind="dense")
    assert set(sparse) - set(dense) == {name for name in sparse if ".scorer." in name}
    run(tmp_path, corpus, "attention.kind=dense", "train.steps=3", "optimizer.warmup_steps=1")
    with pytest.raises(ValueError, match="scorer"):
        weights(tmp_path, kind="sparsek")
    with pytest.raises(FileNotFoundError, match="step=7"):
        weights(tmp_path, step=7, kind="dense")
    with pytest.raises(FileNotFoundError, match="train"):
        restore_model(tmp_path / "none", decoder_config(load_config(tmp_path), VOCAB))


def test_no_parameter_but_a_scorer_gets_lost(tmp_path):
    attention = nn.AttentionConfig(
        kind="nsa", num_heads=2, num_kv_heads=1, head_dim=8, num_selected=4, block_size=2
    )
    config = nn.DecoderConfig(
        vocab_size=11, num_layers=2, d_model=16, mlp_dim=16, attention=attention
    )
    save_params(tmp_path, split(nn.Decoder(config, rngs=nnx.Rngs(0)))[1])
    restored, _ = restore_model(tmp_path, config)
    assert len(split(restored)[1]) == len(split(nn.Decoder(config, rngs=nnx.Rngs(0)))[1])
    dense = dataclasses.replace(config, attention=dataclasses.replace(attention, kind="dense"))
    with pytest.raises(ValueError, match=r"\.compress_key\.inner\.kernel of .* has no place"):
        restore_model(tmp_path, dense)


def test_model_definition_round_trip():
    attention = nn.AttentionConfig(kind="dense", num_heads=2, num_kv_heads=1, head_dim=8)
    config = nn.DecoderConfig(
        vocab_size=11, num_layers=11, d_model=16, mlp_dim=16, attention=attention
    )
    model = nn.Decoder(config, rngs=nnx.Rngs(0))
    definition, params = split(model)
    tokens = np.arange(9)[None] % 11
    np.testing.assert_array_equal(definition.merge(params)(tokens), model(tokens))
    # Ten layers and more: names must meet their own leaves.
    for i in range(11):
        kernel = model.layers[i].attention.query.kernel[...]
        np.testing.assert_array_equal(params[f"layers.{i}.attention.query.kernel"], kernel)
    assert {name: x.shape for name, x in params.items()} == {
        name: x.shape for name, x in definition.abstract.items()
    }
