import math

import numpy as np
import pytest

from sparsek_jax.evaluation.perplexity import LossTally, bucket_edges


@pytest.mark.parametrize(
    ("seq_len", "num_buckets", "edges"),
    [
        (1024, 4, [0, 128, 256, 512, 1024]),
        (100, 3, [0, 25, 50, 100]),
        (7, 3, [0, 2, 4, 7]),
        (3, 8, [0, 1, 2, 3]),
        (1, 1, [0, 1]),
    ],
)
def test_buckets_double_up_to_the_row(seq_len, num_buckets, edges):
    assert bucket_edges(seq_len, num_buckets).tolist() == edges


def test_edges_that_are_asked_for():
    edges = range(2048, 18000, 2048)
    assert bucket_edges(16384, 8, tuple(edges)).tolist() == [0, *range(2048, 16385, 2048)]
    assert bucket_edges(5000, 8, tuple(edges)).tolist() == [0, 2048, 4096, 5000]


def batch(*documents, row=8):
    """One row a document: `documents` are lists of targets."""
    shape = (len(documents), row)
    fields = {name: np.zeros(shape, np.int32) for name in ("targets", "positions")}
    fields["document_ids"] = np.full(shape, -1, np.int32)
    fields["loss_mask"] = np.zeros(shape, np.float32)
    for i, targets in enumerate(documents):
        n = len(targets)
        fields["targets"][i, :n] = targets
        fields["positions"][i, :n] = np.arange(n)
        fields["document_ids"][i, :n] = i
        fields["loss_mask"][i, :n] = 1
    return fields


def add(tally, fields, nats, likeliest=False):
    tally.add(fields, nats, np.broadcast_to(likeliest, nats.shape))


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    tally = LossTally(np.array([1, 1, 2, 0]), bucket_edges(8, 3), 2)
    add(tally, batch([0, 1, 2, 3], [1, 3]), np.full((2, 8), math.log(4), np.float32))
    result = tally.result()
    assert (result.documents, result.tokens, result.bytes) == (2, 6, 5)
    assert result.perplexity == pytest.approx(4)
    # The two ends of document cost their bits but stand for no byte.
    assert result.bits_per_byte == pytest.approx(6 * 2 / 5)
    assert result.standard_error == pytest.approx(0, abs=1e-9)


def test_buckets_partition_the_tokens_by_context():
    rng = np.random.default_rng(0)
    fields = batch(*[rng.integers(0, 4, n) for n in (8, 3, 5)])
    nats = rng.exponential(size=(3, 8)).astype(np.float32)
    likeliest = rng.random((3, 8)) < 0.5
    tally = LossTally(np.ones(4, np.int32), bucket_edges(8, 3), 3)
    add(tally, fields, nats, likeliest)
    result = tally.result()
    for bucket in result.buckets:
        inside = (fields["loss_mask"] > 0) & (fields["positions"] >= bucket.start)
        inside &= fields["positions"] < bucket.stop
        assert bucket.tokens == inside.sum()
        assert bucket.nats_per_token == pytest.approx(nats[inside].mean(dtype=np.float64))
        assert bucket.accuracy == likeliest[inside].mean()
    total = sum(b.tokens * b.nats_per_token for b in result.buckets)
    assert total / result.tokens == pytest.approx(result.nats_per_token)
    assert result.accuracy == likeliest[fields["loss_mask"] > 0].mean()


def test_masked_targets_do_not_count_and_may_be_nan():
    fields = batch([0, 1], [2])
    nats = np.where(fields["loss_mask"] > 0, 2.0, np.nan)
    tally = LossTally(np.ones(4, np.int32), bucket_edges(8, 2), 2)
    add(tally, fields, nats)
    assert tally.result().nats_per_token == 2
    assert math.isnan(tally.result().buckets[-1].nats_per_token)
    assert math.isnan(tally.result().buckets[-1].accuracy)


def test_batches_add_up_without_losing_digits():
    byte_lengths, edges = np.ones(4, np.int32), bucket_edges(8, 1)
    tally = LossTally(byte_lengths, edges, 1)
    add(tally, batch([0] * 8), np.full((1, 8), 1e8, np.float32))
    for _ in range(100):
        add(tally, batch([0] * 8), np.full((1, 8), 0.125, np.float32))
    assert tally.result().nats_per_token == (8e8 + 100) / 808


def test_standard_error_is_that_of_repeated_draws_of_documents():
    """Simulated: documents differ in length and in mean loss, tokens within one do not."""
    rng = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(400):
        lengths = rng.integers(1, 9, 40)
        fields = batch(*[[0] * n for n in lengths])
        nats = np.repeat(rng.exponential(size=(40, 1)), 8, axis=1)
        tally = LossTally(np.ones(4, np.int32), bucket_edges(8, 1), 40)
        add(tally, fields, nats)
        means.append(tally.result().nats_per_token)
        errors.append(tally.result().standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_a_single_document_has_no_standard_error():
    tally = LossTally(np.ones(4, np.int32), bucket_edges(8, 1), 1)
    add(tally, batch([0, 1]), np.ones((1, 8)))
    assert math.isnan(tally.result().standard_error)


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="no target"):
        LossTally(np.ones(4, np.int32), bucket_edges(8, 1), 1).result()


def test_positions_beyond_the_last_edge_are_an_error():
    tally = LossTally(np.ones(4, np.int32), bucket_edges(4, 1), 1)
    with pytest.raises(ValueError, match="positions reach 4"):
        add(tally, batch([0] * 5), np.ones((1, 8)))
