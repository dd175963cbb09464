import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sparsek_jax.data import corpus as corpus_module
from sparsek_jax.data import default_data_config, prepare
from sparsek_jax.data.corpus import hold_out
from sparsek_jax.data.sources import content_digest, resolve_source


def texts(corpus, split):
    """Name -> text of a split's documents."""
    source = getattr(corpus, split)
    return {
        corpus.document_name(i, split): corpus.tokenizer.decode(source[i]["tokens"])
        for i in range(len(source))
    }


def files(config):
    root = Path(config.glob.split("/**")[0])
    return {p.relative_to(root).as_posix(): p for p in root.rglob("*.txt")}


def test_default_is_the_standard_library(tmp_path):
    config = default_data_config()
    config.root, config.max_documents = str(tmp_path), 30
    corpus = prepare(config)
    documents = texts(corpus, "train") | texts(corpus, "validation")
    assert len(documents) == 30
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name, text in documents.items():
        assert text.encode() == (stdlib / name).read_bytes()
    assert not [name for name in documents if "site-packages" in name]


def test_every_file_is_in_exactly_one_split(config):
    corpus = prepare(config)
    train, validation = texts(corpus, "train"), texts(corpus, "validation")
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert train | validation == {name: path.read_text() for name, path in files(config).items()}
    for split, documents in (("train", train), ("validation", validation)):
        stats = corpus.splits[split]
        assert stats.num_documents == len(documents)
        assert stats.num_bytes == stats.num_tokens == sum(len(t) for t in documents.values())


def test_document_name_out_of_range(config):
    corpus = prepare(config)
    with pytest.raises(ValueError, match="document_id=-1"):
        corpus.document_name(-1)


def test_prepared_once(config, monkeypatch):
    first = prepare(config)
    monkeypatch.setattr(corpus_module, "_write", None)  # calling it would raise
    assert prepare(config).directory == first.directory


def test_directory_is_named_by_content_not_place(config, tmp_path):
    first = prepare(config).directory
    shutil.copytree(tmp_path / "text", tmp_path / "elsewhere")
    config.glob = str(tmp_path / "elsewhere" / "**" / "*.txt")
    assert prepare(config).directory == first
    (tmp_path / "elsewhere" / "part0" / "00.txt").write_text("other")
    assert prepare(config).directory != first


@pytest.mark.parametrize(
    ("field", "value"),
    [("validation_fraction", 0.31), ("tokenizer", "bpe:259"), ("max_documents", 11)],
)
def test_directory_depends_on_what_changes_the_documents(config, field, value):
    first = prepare(config).directory
    config[field] = value
    assert prepare(config).directory != first


def test_directory_does_not_depend_on_how_it_is_read(config):
    first = prepare(config).directory
    config.seq_len, config.packing, config.shuffle_window = 16, "continuous", 4
    assert prepare(config).directory == first


def test_bpe_is_trained_on_the_training_split(config, monkeypatch):
    seen = []
    train_bpe = corpus_module.train_bpe

    def spy(documents, vocab_size, path):
        seen.extend(documents)
        train_bpe(seen, vocab_size, path)

    monkeypatch.setattr(corpus_module, "train_bpe", spy)
    config.tokenizer = "bpe:280"
    corpus = prepare(config)
    assert sorted(seen) == sorted(texts(corpus, "train").values())
    for split in ("train", "validation"):
        for name, text in texts(corpus, split).items():
            assert text == files(config)[name].read_text()
    assert corpus.splits["train"].num_tokens < corpus.splits["train"].num_bytes


def test_bpe_training_text_is_capped(config, monkeypatch):
    seen = []
    monkeypatch.setattr(corpus_module, "_MAX_BPE_TRAINING_BYTES", 60)
    monkeypatch.setattr(corpus_module, "train_bpe", lambda documents, *_: seen.extend(documents))
    config.tokenizer = "bpe:280"
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        prepare(config)
    assert 0 < len("".join(seen)) < 120


def test_tokenizer_file_of_large_vocabulary_keeps_its_ids(config, tmp_path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: 70_000 + i for i, char in enumerate(alphabet)}  # does not fit 16 bits
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "big.json"))
    config.tokenizer = str(tmp_path / "big.json")
    for name, text in texts(prepare(config), "train").items():
        assert text == files(config)[name].read_text()


def test_unusable_files_are_named_once_and_skipped(config, caplog):
    root = next(iter(files(config).values())).parent
    good = set(files(config))
    (root / "empty.txt").write_bytes(b"")
    (root / "blank.txt").write_bytes(b" \n")
    (root / "latin1.txt").write_bytes("é".encode("latin-1"))
    (root / "dangling.txt").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.txt")
    (root / "directory.txt").mkdir()
    with caplog.at_level(logging.WARNING):
        corpus = prepare(config)
    warnings = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(warnings) == 1
    for named in ("empty.txt (empty)", "blank.txt (empty)", "latin1.txt (not UTF-8 at byte 0)"):
        assert named in warnings[0]
    assert "dangling.txt (No such file" in warnings[0]
    assert "pipe.txt (not a regular file)" in warnings[0]
    assert "skipped 5" in warnings[0]
    assert set(texts(corpus, "train")) | set(texts(corpus, "validation")) == good


def test_nothing_left_is_an_error(config, tmp_path):
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.txt").write_bytes(b"\xff")
    config.glob = str(tmp_path / "void" / "*.txt")
    with pytest.raises(ValueError, match=r"data\.glob=.*none of its 1 files is usable"):
        prepare(config)


def test_no_match_is_an_error(config, tmp_path):
    config.glob = str(tmp_path / "*.none")
    with pytest.raises(ValueError, match=r"data\.glob=.*matches no file"):
        prepare(config)


def test_one_distinct_document_is_an_error(config, tmp_path):
    (tmp_path / "one").mkdir()
    for name in "ab":
        (tmp_path / "one" / f"{name}.txt").write_text("same")
    config.glob = str(tmp_path / "one" / "*.txt")
    with pytest.raises(ValueError, match=r"data\.glob=.*at least 2 distinct"):
        prepare(config)
    assert not list(Path(config.root).glob("glob-????????????????"))


def test_root_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.root = str(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"data\.root="):
        prepare(config)


def test_copies_of_a_text_stay_on_one_side(config):
    for path in files(config).values():
        shutil.copy(path, path.with_name(f"copy_of_{path.name}"))
    corpus = prepare(config)
    train, validation = texts(corpus, "train"), texts(corpus, "validation")
    assert len(train) + len(validation) == len(files(config))
    assert not set(train.values()) & set(validation.values())


def test_hold_out_is_stable_and_near_the_fraction():
    digests = [content_digest(str(i).encode()) for i in range(2000)]
    held = hold_out(digests, 0.1, description="")
    assert abs(len(held) / 2000 - 0.1) < 0.02
    assert hold_out(digests[::-1], 0.1, description="") == held
    assert hold_out(digests[:1000], 0.1, description="") == held & set(digests[:1000])


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_hold_out_leaves_something_on_both_sides(fraction):
    digests = [content_digest(b"a"), content_digest(b"b"), content_digest(b"c")]
    assert 0 < len(hold_out(digests, fraction, description="")) < 3


def test_half_written_directory_is_never_used(config, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    write_records = corpus_module._write_records
    monkeypatch.setattr(corpus_module, "_write_records", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    left = [p.name for p in Path(config.root).iterdir() if p.is_dir()]
    assert [name for name in left if name.endswith(".incomplete")] == left
    (Path(config.root) / left[0] / "rubbish").write_text("from the process that died")
    monkeypatch.setattr(corpus_module, "_write_records", write_records)
    corpus = prepare(config)
    assert [p.name for p in Path(config.root).iterdir() if p.is_dir()] == [corpus.directory.name]
    assert not (corpus.directory / "rubbish").exists()


def test_file_that_changes_meanwhile_is_an_error(config):
    source = resolve_source(config)
    next(iter(files(config).values())).write_text("changed")
    with pytest.raises(RuntimeError, match="changed while"):
        list(source.documents())


def test_processes_may_prepare_at_the_same_time(config):
    program = (
        "import json, sys, ml_collections\n"
        "from sparsek_jax.data import prepare\n"
        "corpus = prepare(ml_collections.ConfigDict(json.loads(sys.argv[1])))\n"
        "print(corpus.directory, [int(t) for d in corpus.train for t in d['tokens']])\n"
    )
    command = [sys.executable, "-c", program, json.dumps(config.to_dict())]
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.getcwd()},
        )
        for seed in (1, 2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    corpus = prepare(config)
    assert outputs[0].startswith(str(corpus.directory))
    assert [p for p in Path(config.root).iterdir() if p.is_dir()] == [corpus.directory]


def test_preparing_again_elsewhere_gives_the_same_files(config, tmp_path):
    first = prepare(config).directory
    config.root = str(tmp_path / "second")
    second = prepare(config).directory
    names = [p.relative_to(first) for p in first.rglob("*array_record*")]
    assert len(names) == 2
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_max_documents_takes_the_first_in_name_order(config):
    config.max_documents = 4
    corpus = prepare(config)
    documents = texts(corpus, "train") | texts(corpus, "validation")
    assert sorted(documents) == sorted(files(config))[:4]
