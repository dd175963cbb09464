"""What a user of generate.py sees, with a model that writes known words and with a real run."""

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from sparsek_jax.data import prepare, train_iterator
from sparsek_jax.generation import command
from sparsek_jax.generation.chat import Chat
from sparsek_jax.generation.command import Request, generate
from sparsek_jax.generation.engine import Engine, Session
from sparsek_jax.generation.loading import LoadedRun, load_run
from sparsek_jax.generation.sampling import Sampling
from sparsek_jax.nn import Decoder
from sparsek_jax.training.checkpoint import Checkpoints
from sparsek_jax.training.config import ConfigError, decoder_config, default_config
from sparsek_jax.training.parameters import split
from sparsek_jax.training.workdir import save_run
from tests.generation.models import EOS, TOKENIZER, Chain, decoder, words
from tests.training.helpers import ROOT, environment, write_corpus

GREEDY = Sampling(temperature=0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def chain(monkeypatch):
    """Replaces the run by a model that writes known words."""
    transitions = words(["a", "bcd", EOS], ["1", "é€!", EOS], ["w", "w"], ["\n", "xyz", EOS])
    model = Chain(transitions, broken=b"N")
    monkeypatch.setattr(command, "load_run", lambda workdir: LoadedRun(model, TOKENIZER, 7))
    return model


def call(stdin="", stdout=None, **fields):
    """Status, output and messages of a command."""
    stdin = io.StringIO(stdin) if isinstance(stdin, str) else stdin
    stdout, stderr = stdout or io.StringIO(), io.StringIO()
    fields = {"workdir": "runs/x", "sampling": GREEDY, **fields}
    status = generate(Request(**fields), stdin=stdin, stdout=stdout, stderr=stderr)
    return status, stdout.getvalue(), stderr.getvalue()


def test_a_prompt_may_come_from_three_places(chain, tmp_path):
    (tmp_path / "prompt").write_text("see 1")
    for source in (
        {"prompt": "see 1"},
        {"prompt_file": str(tmp_path / "prompt")},
        {"stdin": "see 1"},
    ):
        status, out, messages = call(**source)
        assert (status, out) == (0, "é€!")
        assert messages.startswith("step 7 of runs/x\nprefill 6 tokens, ")
        assert "cache 4 bytes; with dense attention in every layer 12 tokens would take" in messages
        assert "approximate" not in messages
    assert call(prompt="1", stdout=Terminal())[1] == "é€!\n"
    _, out, messages = call(prompt="w", max_tokens=100)
    assert out == "w" * 100
    assert messages.endswith(
        "52 scores of dropped keys had no room in the cache: gates are approximate "
        "(docs/generation.md)\n"
    )
    assert call(prompt="1", stop=["€"])[1] == "é"


def test_prompts_of_a_file_are_continued_together(chain, tmp_path):
    (tmp_path / "prompts").write_text('1\n"w\na\n')
    status, out, _ = call(prompts_file=str(tmp_path / "prompts"), max_tokens=6, stop=["d"])
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": "1", "text": "é€!", "tokens": 6, "end": "length"},
        {"prompt": '"w', "text": "wwwwww", "tokens": 6, "end": "length"},
        {"prompt": "a", "text": "bc", "tokens": 3, "end": "stop"},
    ]


def test_a_conversation_of_lines(chain):
    status, out, messages = call(interactive=True, stdin="1\n\n2\n")
    assert status == 0
    # "xyz" answers the newline behind "1"; after the empty line the document still ends.
    assert out == "xyz\n\nxyz\n"
    assert "prefill 6 tokens" in messages
    # A prompt is answered before any line is read.
    assert call(interactive=True, stdin="", prompt="a")[:2] == (0, "bcd\n")
    # Nothing was said.
    assert call(interactive=True, stdin="\n\n")[:2] == (0, "")


class Interrupting(io.StringIO):
    """Has the user press Ctrl-C when text appears for the first time."""

    def write(self, text):
        if not self.getvalue():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_ends_the_text_but_not_the_statistics(chain, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    status, out, messages = call(prompt="w", max_tokens=10**6, stdout=Interrupting())
    assert status == 130
    assert 1 <= len(out) < 1000
    assert "decode" in messages
    status, out, _ = call(
        prompt="w", interactive=True, stdin="1\n", max_tokens=10**6, stdout=Interrupting()
    )
    assert status == 0
    first, second = out.splitlines()
    assert set(first) == {"w"}
    assert second == "xyz"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_is_the_text_that_was_shown():
    """Each answer is what the model writes after all of that text, from an empty cache."""
    engine = Engine(decoder(), TOKENIZER, chunk_sizes=(16, 16), block_size=8)

    def fresh(text, stop):
        (completion,) = engine.generate([text], max_tokens=20, sampling=GREEDY, stop=stop)
        return completion

    plain = fresh("hello\n", []).text
    for stop in ([], [plain[9:12], plain[3:5]]):
        chat = Chat(Session(engine, 1), max_tokens=20, sampling=GREEDY, stop=stop)
        text, reasons = "", set()
        for line in ("hello", "and on", "", "still"):
            if line:
                chat.say(line)
                text += ("\n" if text and not text.endswith("\n") else "") + line + "\n"
            expected = fresh(text, stop)
            reasons.add(expected.reason)
            answer = "".join(chat.answer(cancelled=lambda: False, block_seconds=0.01))
            assert answer == expected.text
            text += answer
        assert ("stop" in reasons) == bool(stop)


def test_a_conversation_with_dense_attention_gets_full(chain):
    attention = dataclasses.replace(chain.config.attention, kind="dense")
    chain.config = dataclasses.replace(chain.config, attention=attention)
    settings = {"interactive": True, "max_length": 12, "prompt": "w"}
    # The answer is as long as there is room.
    assert call(**settings, max_tokens=50)[1] == "w" * 10 + "\n"
    with pytest.raises(ConfigError, match=r"max_length=12 tokens .* expected at least 15"):
        call(**settings, max_tokens=8, stdin="123")
    assert call(**{**settings, "max_length": None}, max_tokens=50)[1] == "w" * 50 + "\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, r"--prompt='' is empty; expected some text"),
        ({}, "the standard input is empty; expected a prompt"),
        ({"stdin": Terminal()}, "there is no prompt; expected --prompt, --prompt_file, "),
        ({"prompt_file": "FILE"}, "FILE is empty; expected a prompt"),
        ({"prompts_file": "FILE"}, "FILE is empty; expected a prompt"),
        ({"prompt_file": "LATIN"}, "--prompt_file='LATIN': .*utf-8.*; expected UTF-8 text"),
        ({"prompt_file": "none"}, "--prompt_file='none': No such file"),
        ({"prompts_file": "LINES"}, "line 2 of --prompts_file='LINES' is empty; expected"),
        (
            {"prompt": "a", "prompts_file": "LINES"},
            "--prompt='a' and --prompts_file='LINES' are both set; expected at most one",
        ),
        ({"interactive": True, "prompts_file": "LINES"}, "--interactive with --prompts_file"),
        ({"prompt": "a", "max_tokens": 0}, "--max_tokens=0; expected at least 1"),
        ({"prompt": "a", "stop": ["x", ""]}, "--stop='' is empty"),
        ({"prompt": "a", "max_length": 9}, "--max_length=9 without --interactive"),
        ({"interactive": True, "max_length": 1}, "--max_length=1; expected at least 2"),
        ({"interactive": True, "max_length": 9}, "--max_length=9, but the model has no layers"),
        ({"prompt": "a", "explain": ""}, "--explain='' is empty; expected a directory"),
        ({"prompt": "a", "explain": "x"}, "--explain='x': the model has no SparseK layer, only "),
        (
            {"prompts_file": "LINES", "explain": "x"},
            "--explain='x' with --prompts_file='LINES'; expected one text",
        ),
        ({"prompt": "xN"}, "the logits behind token 3 of row 0 are NaN or infinite"),
    ],
)
def test_mistakes_are_named(chain, fields, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "LINES").write_text("a\n\nb\n")
    (tmp_path / "LATIN").write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        call(**fields)


def test_what_was_remembered_is_explained_when_the_text_is_written(monkeypatch, tmp_path):
    model = decoder()
    monkeypatch.setattr(command, "load_run", lambda workdir: LoadedRun(model, TOKENIZER, 7))
    calls = []

    def write(*arguments, **options):
        calls.append((*arguments, options))
        return [arguments[0] + "/page"]

    monkeypatch.setattr(command, "write_explanation", write)
    directory = str(tmp_path / "explained")
    _, out, messages = call(prompt="hello", max_tokens=9, explain=directory)
    assert (tmp_path / "explained").is_dir()
    assert messages.endswith(f"\nwrote {directory}/page\n")
    _, answers, _ = call(stdin="hello\nyou\n", interactive=True, max_tokens=9, explain=directory)
    call(stdin="", interactive=True, explain=directory)

    # A conversation that never began left nothing to explain.
    (_, *loaded, tokens, options), (*_, conversation, of_conversation) = calls
    assert loaded == [model, TOKENIZER]
    assert tokens.tolist() == [TOKENIZER.bos_id, *f"hello{out}".encode()]
    assert options == {"title": "x, step 7", "prompt_length": 6}
    first, second = answers.splitlines()
    assert TOKENIZER.decode(conversation) == f"hello\n{first}\nyou\n{second}"
    assert of_conversation == {"title": "x, step 7", "prompt_length": None}

    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--explain=.*: File exists; expected a directory"):
        call(prompt="hello", explain=str(tmp_path / "file"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Working directory of a run that was never trained, with its configuration."""
    directory = tmp_path_factory.mktemp("run")
    config = default_config()
    config.data.glob = f"{write_corpus(directory / 'text')}/*.txt"
    config.data.root = str(directory / "prepared")
    config.data.tokenizer = "bpe:300"
    config.data.seq_len = 16
    config.model.update(num_layers=1, d_model=16, mlp_dim=16)
    config.attention.update(
        num_heads=2, num_kv_heads=1, head_dim=8, num_selected=4, sliding_window=4
    )
    # Not one that this machine has.
    config.attention.implementation = "mosaic_gpu"
    corpus = prepare(config.data)
    model = Decoder(decoder_config(config, corpus.tokenizer.vocab_size), rngs=nnx.Rngs(0))
    workdir = directory / "workdir"
    checkpoints = Checkpoints(workdir, keep=1)
    iterator = train_iterator(corpus, config.data, batch_size=1, seed=0)
    state = {"params": split(model)[1], "optimizer": {"none": jnp.zeros(1)}}
    checkpoints.save(5, state, iterator)
    checkpoints.close()
    save_run(workdir, config, corpus)
    return workdir, config, corpus


def script(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "generate.py", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


def test_the_program_writes_what_the_library_does(run):
    workdir, _, corpus = run
    shutil.rmtree(corpus.directory / "records")
    arguments = ("--max_tokens=30", "--temperature=0.5", "--top_k=9", "--top_p=0.9", "--seed=3")
    result = script(f"--workdir={workdir}", "--prompt=w1 w2", "--stop=zz", "--stop=yy", *arguments)
    assert result.returncode == 0, result.stderr
    loaded = load_run(workdir)
    (expected,) = Engine(loaded.model, loaded.tokenizer).generate(
        ["w1 w2"], max_tokens=30, sampling=Sampling(temperature=0.5, top_k=9, top_p=0.9, seed=3)
    )
    assert result.stdout == expected.text
    assert f"step 5 of {workdir}\nprefill " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a", "--top_p=2"], "--top_p=2.0; expected a number above 0 and at most 1"),
        (["--prompt=a", "more"], "unexpected argument 'more'; expected --flag=value"),
        (["--prompt=a"], "workdir='runs/none' holds no run (no config.json); train one first"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message):
    result = script("--workdir=runs/none", *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert result.stdout == ""


def test_a_run_without_what_is_needed(run, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(run[0], workdir)
    saved = json.loads((workdir / "config.json").read_text())

    def change(**fields):
        data = saved["data"] | fields
        (workdir / "config.json").write_text(json.dumps(saved | {"data": data}))

    change(root=str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"the tokenizer of workdir=.* holds no tokenizer\.json"):
        load_run(workdir)
    change(tokenizer="bytes")
    with pytest.raises(ConfigError, match="'bytes' is not the tokenizer that the run in workdir="):
        load_run(workdir)
    copied = tmp_path / "elsewhere" / run[2].directory.name
    copied.mkdir(parents=True)
    text = (run[2].directory / "tokenizer.json").read_text()
    change(root=str(tmp_path / "elsewhere"))
    (copied / "tokenizer.json").write_text(text)
    assert load_run(workdir).step == 5
    (copied / "tokenizer.json").write_text(text + " ")
    with pytest.raises(ConfigError, match="'bpe:300' is not the tokenizer that the run"):
        load_run(workdir)
    # A run of before the tokenizer was recorded.
    (workdir / "run.json").unlink()
    change(tokenizer="bytes")
    message = r"expects \(258, 16\); data\.tokenizer='bytes' has 258 ids"
    with pytest.raises(ConfigError, match=message):
        load_run(workdir)
    change()
    shutil.rmtree(workdir / "checkpoints")
    shutil.copy(run[0] / "run.json", workdir)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; train first"):
        load_run(workdir)
