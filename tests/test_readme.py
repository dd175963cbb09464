"""Runs what README and docs show: Python blocks as they are, the README's commands made smaller."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))]
PYTHON_BLOCKS = [
    (page, code)
    for page in PAGES
    for code in re.findall(
        r"^```python\n(.*?)^```$", (REPOSITORY / page).read_text(), re.MULTILINE | re.DOTALL
    )
]
COMMANDS = [
    shlex.split(line, comments=True)
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.strip()
]
PROGRAMS = [words for words in COMMANDS if words[0] == "python"]
# Appended to a command; the last flag wins. A recipe's own sizes would take minutes.
SMALLER = {
    "train.py": (
        "--config.train.steps=2",
        "--config.train.batch_size=2",
        "--config.train.eval_batches=1",
        "--config.optimizer.warmup_steps=1",
        "--config.model.num_layers=1",
        "--config.model.d_model=32",
        "--config.model.mlp_dim=32",
        "--config.data.seq_len=64",
        "--config.data.max_documents=40",
        "--config.sample.length=4",
    ),
    "convert.py": (),
    "generate.py": ("--max_tokens=4",),
    "benchmarks.scaling": ("--length=32,64", "--num_selected=8", "--sliding_window=8"),
}
SMALLER["eval.py"] = SMALLER["train.py"]


def test_every_block_is_checked_here():
    assert len(PYTHON_BLOCKS) >= 5
    assert len(PROGRAMS) >= 3
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "bibtex"}
    known = {"make", "python", "pip"}
    assert [c for c in COMMANDS if c[0] not in known] == [["source", ".venv/bin/activate"]]


@pytest.mark.parametrize(("page", "code"), PYTHON_BLOCKS, ids=range(len(PYTHON_BLOCKS)))
def test_python_block_runs_and_prints_what_it_says(page, code, capsys):
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    exec(compile(code, page, "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert ["".join(line.split()) for line in printed] == ["".join(line.split()) for line in said]


@pytest.mark.parametrize(
    "words", [c for c in COMMANDS if c[0] == "make"], ids=lambda words: " ".join(words)
)
def test_make_target_exists(words):
    plan = subprocess.run(
        ["make", "--dry-run", *words[1:]], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert plan.returncode == 0, plan.stderr


def test_extras_exist():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    wanted = re.findall(r"\[(\w+)\]", " ".join(" ".join(c) for c in COMMANDS if c[0] == "pip"))
    assert wanted
    assert set(wanted) <= set(extras)


def test_programs_run_in_the_order_shown(tmp_path):
    texts = tmp_path / "texts" / "deep"
    texts.mkdir(parents=True)
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"Document {i}: the quick brown fox. " * 20)
    # What several programs need is compiled once.
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for words in PROGRAMS:
        program = words[2] if words[1] == "-m" else words[1]
        arguments = [
            re.sub(
                r"([=:])(texts|runs)/", lambda match: f"{match[1]}{tmp_path}/{match[2]}/", argument
            )
            for argument in words[1:]
        ]
        if "--config=" in " ".join(arguments):
            arguments.append(f"--config.data.root={tmp_path}/data")
        finished = subprocess.run(
            [sys.executable, *arguments, *SMALLER[program]],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, f"{shlex.join(words)}\n{finished.stderr[-4000:]}"
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").stat().st_size > 0


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *PAGES])
def test_links_lead_somewhere(page):
    path = REPOSITORY / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    broken = [x for x in links if "://" not in x and not (path.parent / x).exists()]
    assert not broken
