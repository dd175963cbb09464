import itertools
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain.checkpoint import CheckpointRestore, CheckpointSave

from sparsek_jax.data import prepare, train_iterator, validation_batches

FIELDS = {"inputs", "targets", "positions", "segment_ids", "document_ids", "loss_mask"}


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == FIELDS
        for field in FIELDS:
            np.testing.assert_array_equal(a[field], b[field])


def differ(left, right):
    pairs = zip(left, right, strict=True)
    return any(not np.array_equal(a["inputs"], b["inputs"]) for a, b in pairs)


def predictions(batches):
    """Document id -> [(input, target), ...] in the order in which they came."""
    found = {}
    for batch in batches:
        valid = batch["loss_mask"] == 1
        columns = (batch[field][valid] for field in ("document_ids", "inputs", "targets"))
        for document_id, *pair in zip(*columns, strict=True):
            found.setdefault(int(document_id), []).append(tuple(map(int, pair)))
    return found


def expected_predictions(corpus, split):
    source = getattr(corpus, split)
    bos, eos = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
    expected = {}
    for index in range(len(source)):
        tokens = source[index]["tokens"].tolist()
        expected[index] = list(zip([bos, *tokens], [*tokens, eos], strict=True))
    return expected


@pytest.mark.parametrize("packing", ["segments", "continuous"])
@pytest.mark.parametrize("seq_len", [1, 7, 8, 500])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_predicts_every_token_once(config, packing, seq_len, batch_size):
    config.packing, config.seq_len = packing, seq_len
    corpus = prepare(config)
    batches = validation_batches(corpus, config, batch_size=batch_size)
    found = list(batches)
    assert len(found) == len(batches)
    assert predictions(found) == expected_predictions(corpus, "validation")
    assert any(batch["loss_mask"].any() for batch in found[-1:])  # no batch is all padding
    assert_same(found, list(batches))


@pytest.mark.parametrize("packing", ["segments", "continuous"])
def test_one_epoch_predicts_every_token_once(config, packing):
    config.packing, config.seq_len, config.shuffle_window = packing, 1, 1
    corpus = prepare(config)
    stats = corpus.splits["train"]
    epoch = stats.num_tokens + stats.num_documents
    iterator = train_iterator(corpus, config, batch_size=1, seed=0)
    first, second = take(iterator, epoch), take(iterator, epoch)
    assert predictions(first) == expected_predictions(corpus, "train")
    assert predictions(second) == expected_predictions(corpus, "train")
    assert differ(first, second)  # another order


def test_shapes_and_dtypes(config):
    corpus = prepare(config)
    train = next(train_iterator(corpus, config, batch_size=3, seed=0))
    held_out = next(iter(validation_batches(corpus, config, batch_size=3)))
    for batch in (train, held_out):
        assert batch.keys() == FIELDS
        for field, array in batch.items():
            assert isinstance(array, np.ndarray)
            assert array.shape == (3, 8)
            assert array.dtype == (np.float32 if field == "loss_mask" else np.int32)


def rows_of(batches):
    for batch in batches:
        for index in range(len(batch["inputs"])):
            yield {field: array[index] for field, array in batch.items()}


def test_segments_are_whole_pieces_of_one_document(config):
    config.seq_len = 16
    corpus = prepare(config)
    batches = take(train_iterator(corpus, config, batch_size=2, seed=3), 40)
    seen_several = False
    for row in rows_of(batches):
        ids = row["segment_ids"]
        starts = np.flatnonzero(np.diff(ids, prepend=0))
        assert ids[starts].tolist() == list(range(1, len(starts) + 1))
        seen_several |= len(starts) > 2
        for start, stop in itertools.pairwise([*starts, len(ids)]):
            assert len(set(row["document_ids"][start:stop])) == 1
            assert row["positions"][start:stop].tolist() == list(range(stop - start))
            targets, inputs = row["targets"][start : stop - 1], row["inputs"][start + 1 : stop]
            assert targets.tolist() == inputs.tolist()
            # A new document in the middle of a row begins with bos, after the last one's eos.
            if start:
                assert row["inputs"][start] == corpus.tokenizer.bos_id
                assert row["targets"][start - 1] == corpus.tokenizer.eos_id
    assert seen_several


def test_continuous_rows_are_one_segment_over_the_same_stream(config):
    corpus = prepare(config)
    apart = take(train_iterator(corpus, config, batch_size=2, seed=3), 20)
    config.packing = "continuous"
    joined = take(train_iterator(corpus, config, batch_size=2, seed=3), 20)
    for a, b in zip(apart, joined, strict=True):
        for field in ("inputs", "targets", "document_ids", "loss_mask"):
            np.testing.assert_array_equal(a[field], b[field])
        assert (b["segment_ids"] == 1).all()
        assert (b["positions"] == np.arange(8)).all()


def test_training_rows_have_no_padding(config):
    corpus = prepare(config)
    for batch in take(train_iterator(corpus, config, batch_size=2, seed=0), 60):
        assert (batch["loss_mask"] == 1).all()
        assert (batch["segment_ids"] > 0).all()
        assert (batch["document_ids"] >= 0).all()


@pytest.mark.parametrize("packing", ["segments", "continuous"])
def test_padding_is_marked_in_every_field(config, packing):
    config.packing, config.seq_len = packing, 500
    corpus = prepare(config)
    batch = list(validation_batches(corpus, config, batch_size=4))[-1]
    padding = batch["loss_mask"] == 0
    assert padding[0].any()
    assert padding[-1].all()
    for field, value in (("segment_ids", 0), ("document_ids", -1), ("positions", 0)):
        assert (batch[field][padding] == value).all()
        assert ((batch[field][~padding] != value) | (field == "positions")).all()
    assert set(batch["loss_mask"].ravel()) == {0.0, 1.0}


def test_document_ids_name_the_document(config):
    corpus = prepare(config)
    for row in rows_of(take(train_iterator(corpus, config, batch_size=1, seed=0), 10)):
        document_id = int(row["document_ids"][0])
        piece = corpus.tokenizer.decode(row["targets"][row["segment_ids"] == 1])
        root = Path(config.glob.split("/**")[0])
        assert piece in (root / corpus.document_name(document_id)).read_text()


def test_seed_fixes_the_order(config):
    corpus = prepare(config)
    first, again, other = (
        take(train_iterator(corpus, config, batch_size=2, seed=seed), 30) for seed in (1, 1, 2)
    )
    assert_same(first, again)
    assert differ(first, other)


def test_window_shuffles_rows(config):
    corpus = prepare(config)
    config.shuffle_window = 1
    plain = take(train_iterator(corpus, config, batch_size=1, seed=0), 16)
    config.shuffle_window = 16
    shuffled = take(train_iterator(corpus, config, batch_size=1, seed=0), 16)
    assert differ(plain, shuffled)
    assert sorted(b["inputs"].tobytes() for b in plain) == sorted(
        b["inputs"].tobytes() for b in shuffled
    )


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_share_each_epoch(config, process_count):
    config.seq_len, config.shuffle_window = 1, 1
    corpus = prepare(config)
    expected = expected_predictions(corpus, "train")
    order = []  # documents by process, one epoch and more
    for process_index in range(process_count):
        iterator = train_iterator(
            corpus, config, batch_size=1, seed=5, process_index=process_index,
            process_count=process_count,
        )  # fmt: skip
        documents = []
        while len(documents) < 2 * len(expected):
            document_id = int(next(iterator)["document_ids"][0, 0])
            documents.append(document_id)
            take(iterator, len(expected[document_id]) - 1)
        order.append(documents)
    interleaved = list(itertools.chain.from_iterable(zip(*order, strict=True)))
    for epoch in range(2):
        shard = interleaved[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert sorted(shard) == sorted(expected)


def test_one_training_document_serves_many_processes(config):
    config.max_documents = 2
    corpus = prepare(config)
    assert len(corpus.train) == len(corpus.validation) == 1
    for process_index in range(3):
        iterator = train_iterator(
            corpus, config, batch_size=4, seed=0, process_index=process_index, process_count=3
        )
        assert [b["inputs"].shape for b in take(iterator, 3)] == [(4, 8)] * 3


@pytest.mark.parametrize("process_count", [2, 5])
def test_validation_shards_make_up_the_joint_batches(config, process_count):
    corpus = prepare(config)
    joint = list(validation_batches(corpus, config, batch_size=2 * process_count))
    shards = [
        list(
            validation_batches(
                corpus, config, batch_size=2, process_index=i, process_count=process_count
            )
        )
        for i in range(process_count)
    ]
    assert [len(shard) for shard in shards] == [len(joint)] * process_count
    rebuilt = [
        {field: np.concatenate([part[field] for part in parts]) for field in FIELDS}
        for parts in zip(*shards, strict=True)
    ]
    assert_same(rebuilt, joint)


@pytest.mark.parametrize("packing", ["segments", "continuous"])
@pytest.mark.parametrize("shuffle_window", [1, 5])
def test_state_restores_bitwise_at_every_step(config, packing, shuffle_window):
    # Through JSON as grain's checkpoint handler does it; rows of 8 end with a document now and
    # then, and at the very beginning nothing is left over either.
    config.packing, config.shuffle_window = packing, shuffle_window
    corpus = prepare(config)
    iterator = train_iterator(corpus, config, batch_size=2, seed=0)
    states, batches = [], []
    for _ in range(60):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for step, state in enumerate(states[:-3]):
        fresh = train_iterator(corpus, config, batch_size=2, seed=0)
        fresh.set_state(json.loads(state))
        assert_same(take(fresh, 3), batches[step : step + 3])


@pytest.mark.parametrize("steps", [0, 1, 17])
def test_orbax_saves_and_restores_the_iterator(config, tmp_path, steps):
    config.shuffle_window = 5
    corpus = prepare(config)
    iterator = train_iterator(corpus, config, batch_size=2, seed=0)
    take(iterator, steps)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        arguments = {"state": ocp.args.StandardSave({"w": jax.numpy.ones(3)})}
        manager.save(steps, args=ocp.args.Composite(data=CheckpointSave(iterator), **arguments))
        expected = take(iterator, 20)
    fresh = train_iterator(corpus, config, batch_size=2, seed=0)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        restored = manager.restore(steps, args=ocp.args.Composite(data=CheckpointRestore(fresh)))
    assert_same(take(restored["data"], 20), expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
        ({"process_index": -1}, "process_index=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_impossible_arguments(config, arguments, named):
    corpus = prepare(config)
    with pytest.raises(ValueError, match=named):
        train_iterator(corpus, config, **{"batch_size": 1, "seed": 0, **arguments})
    arguments.pop("seed", None)
    if arguments:
        with pytest.raises(ValueError, match=named):
            validation_batches(corpus, config, **{"batch_size": 1, **arguments})
