"""Batches whose rows go on from the rows before."""

import itertools
import json

import numpy as np
import pytest

from sparsek_jax.data import prepare
from sparsek_jax.data.lanes import LaneValidation, lane_iterator, without_past
from tests.data.test_pipeline import assert_same, differ, expected_predictions, predictions, take


def lane_rows(batches, lane):
    """The fields of a lane's rows, one after another."""
    return {
        field: np.concatenate([batch[field][lane] for batch in batches]) for field in batches[0]
    }


def test_rows_continue_the_rows_before(config):
    config.seq_len = 7
    corpus = prepare(config)
    batches = take(lane_iterator(corpus, config, batch_size=3, seed=0), 60)
    continued = 0
    for lane in range(3):
        stream = lane_rows(batches, lane)
        starts = np.flatnonzero(stream["positions"] == 0)
        assert starts[0] == 0
        assert len(starts) > 2
        for start, stop in itertools.pairwise(starts):
            document = stream["document_ids"][start]
            assert set(stream["document_ids"][start:stop]) == {document}
            assert stream["positions"][start:stop].tolist() == list(range(stop - start))
            tokens = corpus.train[document]["tokens"]
            expected = [corpus.tokenizer.bos_id, *tokens]
            assert stream["inputs"][start:stop].tolist() == expected
            assert stream["targets"][start:stop].tolist() == [*tokens, corpus.tokenizer.eos_id]
        for batch in batches:
            ids = batch["segment_ids"][lane]
            begins = batch["positions"][lane] == 0
            assert ids.tolist() == (np.cumsum(begins) + (not begins[0])).tolist()
            continued += not begins[0]
        assert np.all(stream["loss_mask"] == 1)
    assert continued > 30


def test_every_document_is_read_by_one_lane_of_one_process_an_epoch(config):
    corpus = prepare(config)
    seen = []
    for process in range(2):
        batches = take(
            lane_iterator(
                corpus, config, batch_size=2, seed=1, process_index=process, process_count=2
            ),
            200,
        )
        for lane in range(2):
            stream = lane_rows(batches, lane)
            order = stream["document_ids"][stream["positions"] == 0]
            # Of the documents of the first epoch; they are dealt out to four lanes.
            seen.extend(order[: len(range(2 * process + lane, len(corpus.train), 4))])
    assert sorted(seen) == list(range(len(corpus.train)))


def test_resumes_exactly_and_by_seed(config):
    corpus = prepare(config)

    def make(seed=5):
        return lane_iterator(corpus, config, batch_size=3, seed=seed)

    iterator = make()
    take(iterator, 11)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 20)
    restored = make()
    restored.set_state(state)
    assert_same(take(restored, 20), expected)
    # Also from a place before the one that was reached.
    restored.set_state(state)
    assert_same(take(restored, 20), expected)
    assert differ(take(make(seed=6), 3), take(make(), 3))


@pytest.mark.parametrize(("batch_size", "process_count"), [(1, 1), (4, 1), (2, 2), (40, 1)])
def test_held_out_tokens_are_read_once(config, batch_size, process_count):
    corpus = prepare(config)
    parts = [
        LaneValidation(
            corpus,
            config,
            batch_size=batch_size,
            process_index=process,
            process_count=process_count,
        )
        for process in range(process_count)
    ]
    batches = [list(part) for part in parts]
    assert {len(part) for part in parts} == {len(part) for part in batches}
    joined = [
        {field: np.concatenate([batch[field] for batch in together]) for field in together[0]}
        for together in zip(*batches, strict=True)
    ]
    assert predictions(joined) == expected_predictions(corpus, "validation")
    longest = max(batch["positions"].max() for batch in joined) + 1
    assert {part.longest for part in parts} == {longest}
    assert any(batch["loss_mask"].any() for batch in joined[-1:])
    assert_same(batches[0], list(parts[0]))
    if process_count > 1:
        whole = LaneValidation(corpus, config, batch_size=batch_size * process_count)
        assert_same(joined, list(whole))


def test_positions_without_past_count_from_the_row(config):
    config.seq_len = 16
    corpus = prepare(config)
    for batch in take(lane_iterator(corpus, config, batch_size=2, seed=0), 30):
        truncated = without_past(batch)
        for ids, positions in zip(batch["segment_ids"], truncated["positions"], strict=True):
            starts = np.flatnonzero(np.diff(ids, prepend=0))
            for start, stop in itertools.pairwise([*starts, len(ids)]):
                assert positions[start:stop].tolist() == list(range(stop - start))


def test_bad_shares_are_named(config):
    corpus = prepare(config)
    with pytest.raises(ValueError, match="batch_size=0"):
        lane_iterator(corpus, config, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="seed=-1"):
        lane_iterator(corpus, config, batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="process_index=1"):
        LaneValidation(corpus, config, batch_size=1, process_index=1)
