"""Who may train in a directory while another process does."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from sparsek_jax.training import lock as lock_module
from sparsek_jax.training.config import ConfigError
from sparsek_jax.training.lock import LOCK_FILE, lock
from tests.training.helpers import ROOT, command, environment, run, start_two, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def locked(tmp_path):
    """A directory that someone who left no name trains in."""
    with (tmp_path / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield tmp_path


def test_a_second_trainer_is_refused_until_the_first_is_killed(corpus, tmp_path):
    # So large a number that it is the test that ends the run.
    arguments = ("train.steps=1000000", "train.checkpoint_every=4", "eval.batches=1")
    first = subprocess.Popen(
        command(tmp_path, corpus, *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        next(line for line in first.stdout if line.startswith("step 9/"))
        # It leaves the processor to the others, but no lock.
        first.send_signal(signal.SIGSTOP)
        metrics = (tmp_path / "metrics.jsonl").stat().st_ino
        second = run(tmp_path, corpus, *arguments, "train.steps=20")
        evaluation = subprocess.run(
            [sys.executable, "eval.py", *command(tmp_path, corpus, *arguments)[2:]],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        first.kill()
        first.communicate()
    with lock(tmp_path):
        pass
    (line,) = second.stderr.splitlines()
    assert second.returncode == 2
    assert line.startswith(f"error: workdir='{tmp_path}': another process trains there")
    assert f"(process {first.pid} on {socket.gethostname()})" in line
    assert (tmp_path / "metrics.jsonl").stat().st_ino == metrics
    assert evaluation.returncode == 0, evaluation.stderr
    assert list((tmp_path / "eval").glob("*.json"))


def test_both_processes_of_a_second_run_are_refused(corpus, locked):
    processes = start_two(locked, corpus)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    for output in outputs:
        assert f"error: workdir='{locked}': another process trains there; expected" in output
    assert [path.name for path in locked.iterdir()] == [LOCK_FILE]


def test_nobody_else_may_train_meanwhile_but_afterwards(tmp_path):
    for _ in range(2):
        with lock(tmp_path):
            message = rf"trains there \(process {os.getpid()} on "
            with pytest.raises(ConfigError, match=message), lock(tmp_path / ".." / tmp_path.name):
                pass


def test_an_error_gives_the_directory_back(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path):
        pass


def test_who_holds_the_lock_is_told_if_it_is_known(locked):
    with pytest.raises(ConfigError, match="trains there; expected"), lock(locked):
        pass
    (locked / LOCK_FILE).write_text("process 7 on node3\n")
    message = r"trains there \(process 7 on node3\); expected"
    with pytest.raises(ConfigError, match=message), lock(locked):
        pass


def test_a_full_disk_is_no_obstacle(monkeypatch, tmp_path):
    def write(file, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    with lock(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_trained_on(number, monkeypatch, caplog, tmp_path):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path):
        pass
    assert f"workdir='{tmp_path}' cannot be locked ({os.strerror(number)})" in caplog.text


def test_a_lock_file_that_cannot_be_opened_is_no_obstacle(caplog, tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    with lock(tmp_path):
        pass
    assert "cannot be locked (Is a directory)" in caplog.text


def test_a_system_without_fcntl_is_trained_on(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(lock_module, "fcntl", None)
    with lock(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
    assert not list(tmp_path.iterdir())
