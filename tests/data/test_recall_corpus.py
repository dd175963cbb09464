import json
import re

import numpy as np
import pytest

from sparsek_jax.data import (
    default_data_config,
    load_tokenizer,
    prepare,
    train_iterator,
    validate_data_config,
    validation_batches,
)


def recall_config(**changes):
    config = default_data_config()
    config.tokenizer, config.seq_len = "ids:40", 64
    config.recall.update(num_pairs=4, spread=16, gap=8, num_fillers=10, validation_rows=21)
    with config.unlocked():
        for name, value in changes.items():
            config[name] = value
    return config


def rows(batches, count):
    """The first rows of an iterable of batches, each a dict."""
    found = []
    for batch in batches:
        size = len(batch["inputs"])
        found += [{name: field[i] for name, field in batch.items()} for i in range(size)]
        if len(found) >= count:
            return found[:count]
    return found


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def training(config, *, seed=3, batch_size=5, **shares):
    return train_iterator(prepare(config), config, batch_size=batch_size, seed=seed, **shares)


def held_out(config, **shares):
    return validation_batches(prepare(config), config, **shares)


def test_training_rows_depend_on_the_seed_alone():
    config = recall_config()
    once = rows(training(config), 40)
    assert_same(once, rows(training(config, batch_size=8), 40))
    other = rows(training(config, seed=4), 40)
    assert all((a["inputs"] != b["inputs"]).any() for a, b in zip(once, other, strict=True))
    assert len({row["inputs"].tobytes() for row in once}) == 40
    assert [row["document_ids"][0] for row in once] == list(range(40))


def test_processes_share_the_rows():
    config = recall_config()
    together = rows(training(config), 30)
    for index in range(3):
        shares = {"process_index": index, "process_count": 3}
        assert_same(together[index::3], rows(training(config, batch_size=2, **shares), 10))


def test_rows_are_what_the_configuration_says():
    for row in rows(training(recall_config()), 10):
        (queries,) = np.nonzero(row["loss_mask"])
        assert len(queries) == 4
        assert queries.min() >= 24
        pairs = np.flatnonzero(row["inputs"][:16] < 30)
        assert len(pairs) == 8
        assert (row["inputs"][16:24] >= 30).all()


def test_state_restores_bitwise_and_is_json():
    config = recall_config()
    iterator = training(config)
    for _ in range(7):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = rows(iterator, 20)
    resumed = training(config)
    resumed.set_state(state)
    assert_same(rows(resumed, 20), expected)


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize("batch_size", [4, 21])
def test_every_held_out_row_comes_once_and_then_padding(batch_size, process_count):
    config = recall_config()
    whole = rows(held_out(config, batch_size=1), 21)
    batches = [
        held_out(config, batch_size=batch_size, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    joint = []
    for group in zip(*batches, strict=True):
        joint += rows(group, 1000)
    assert len(batches[0]) * batch_size * process_count == len(joint)
    assert_same(joint[:21], whole)
    for row in joint[21:]:
        assert not row["loss_mask"].any()
        assert not row["segment_ids"].any()
        assert set(row["document_ids"]) == {-1}


def test_held_out_rows_are_none_of_the_training_rows():
    config = recall_config()
    trained_on = {row["inputs"].tobytes() for row in rows(training(config, seed=0), 100)}
    assert not trained_on & {
        r["inputs"].tobytes() for r in rows(held_out(config, batch_size=1), 21)
    }


def test_corpora_are_told_apart_but_not_by_the_length_of_rows():
    name = prepare(recall_config()).directory.name
    assert prepare(recall_config(seq_len=128)).directory.name == name
    assert prepare(recall_config(tokenizer="ids:41")).directory.name != name
    other = recall_config()
    other.recall.gap = 10
    assert prepare(other).directory.name != name


def test_ids_are_spelled_as_numbers():
    tokenizer = load_tokenizer("ids:40")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (40, 0, 0)
    ids = tokenizer.encode("7  39\n1")
    assert ids.tolist() == [7, 39, 1]
    assert tokenizer.encode(tokenizer.decode([7, 0, 39, 1])).tolist() == [7, 39, 1]
    for text in ("0", "40", "-1", "x", "1.5"):
        with pytest.raises(ValueError, match=r"is no token; expected 1 to 39"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "bytes"}, "data.tokenizer='bytes' with data.recall.num_pairs=4"),
        ({"tokenizer": "ids:0"}, "data.tokenizer='ids:0'; expected 'ids:<vocab_size>'"),
        ({"tokenizer": "ids:19"}, "data.recall: vocab_size=19; expected at least 20"),
        ({"seq_len": 30}, "data.recall: length=30; expected an even number of at least 32"),
        ({"glob": "*.txt"}, "data.recall.num_pairs=4 and data.glob='*.txt' are both set"),
        ({"tfds": "x"}, "data.recall.num_pairs=4 and data.tfds='x' are both set"),
        ({"num_pairs": 0}, "data.tokenizer='ids:40' with data.recall.num_pairs=0"),
        ({"num_pairs": -1}, "data.recall.num_pairs=-1; expected an integer >= 1"),
        ({"spread": 7}, "data.recall: spread=7; expected an even number of at least 8"),
        ({"gap": 3}, "data.recall: gap=3; expected an even number"),
        ({"gap": -2}, "data.recall.gap=-2; expected an integer >= 0"),
        ({"power": 0.0}, "data.recall: power=0.0"),
        ({"validation_rows": 0}, "data.recall.validation_rows=0; expected an integer >= 1"),
    ],
)
def test_impossible_fields_are_named(changes, message):
    config = recall_config()
    for name, value in changes.items():
        (config.recall if name in config.recall else config)[name] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_data_config(config)
