import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax.evaluation.tasks import TASKS
from sparsek_jax.evaluation.tasks.grid import Grid
from sparsek_jax.evaluation.tasks.scoring import score
from sparsek_jax.evaluation.tasks.task import Example

VOCAB = 11
# Prompts and answers of several lengths, so that all but the longest are padded. An answer has no
# token of its prompt, so that a table of what follows which can know it.
EXAMPLES = [
    Example(np.arange(n, dtype=np.int32) % VOCAB, np.arange(m, dtype=np.int32) + 7)
    for n, m in ((5, 3), (6, 1), (4, 4), (7, 2), (5, 3))
]


def follows(table, tokens, at):
    """A model whose likeliest token depends on the one before: table[token]."""
    before = jnp.take_along_axis(tokens, at, axis=1)
    return 5.0 * jax.nn.one_hot(table[before], VOCAB)


def right_table(examples):
    table = np.zeros(VOCAB, np.int32)
    for example in examples:
        whole = np.concatenate([example.prompt[-1:], example.answer])
        table[whole[:-1]] = whole[1:]
    return table


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_model_that_knows_the_answer(batch_size):
    for example in EXAMPLES:
        table = right_table([example])
        (result,) = score(follows, table, [example], batch_size=batch_size)
        per_token = np.log(1 + (VOCAB - 1) * np.exp(-5.0))
        assert result.credit == 1
        assert result.nats == pytest.approx(len(example.answer) * per_token, rel=1e-5)


def test_a_model_that_is_wrong_in_the_last_token():
    for example in EXAMPLES:
        table = right_table([example])
        before = [*example.prompt, *example.answer][-2]
        table[before] = (table[before] + 1) % VOCAB
        (result,) = score(follows, table, [example], batch_size=1)
        assert result.credit == 0


def test_scores_are_in_order_whatever_the_batches():
    table = right_table(EXAMPLES[:1])
    one_by_one = [next(score(follows, table, [example], batch_size=1)) for example in EXAMPLES]
    assert [result.credit for result in one_by_one] == [1, 0, 0, 0, 1]
    for batch_size in (2, 5, 7):
        together = list(score(follows, table, EXAMPLES, batch_size=batch_size))
        assert [r.credit for r in together] == [r.credit for r in one_by_one]
        np.testing.assert_allclose(
            [r.nats for r in together], [r.nats for r in one_by_one], rtol=1e-6
        )


def test_queries_are_answered_one_by_one():
    """Their tokens are not read: after each query the prompt goes on as it does."""
    prompt = np.array([3, 9, 4, 10, 0, 4, 0, 3], np.int32)
    example = Example(prompt, np.array([10, 9], np.int32), queries=np.array([5, 7], np.int32))
    table = np.zeros(VOCAB, np.int32)
    table[[3, 4]] = 9, 10
    other = dataclasses.replace(example, answer=np.array([10, 8], np.int32))
    examples = [example, other, EXAMPLES[0]]
    for batch_size in (1, 3):
        results = list(score(follows, table, examples, batch_size=batch_size))
        assert [result.credit for result in results] == [1, 0.5, 0]
        right = np.log(1 + (VOCAB - 1) * np.exp(-5.0))
        assert [r.nats for r in results[:2]] == pytest.approx([2 * right, 2 * right + 5], rel=1e-5)


def test_cells_sum_up_their_own_examples():
    grid = Grid(lengths=(9,), depths=(0.0, 1.0), samples=2, seed=0)
    examples = EXAMPLES[:4]
    scores = list(score(follows, right_table(EXAMPLES[:1]), examples, batch_size=4))
    first, second = grid.cells(TASKS["passkey"], 9, examples, scores)
    assert (first.depth, first.correct, first.accuracy, first.prompt_tokens) == (0.0, 1, 0.5, 5.5)
    assert (second.depth, second.correct, second.accuracy) == (1.0, 0, 0.0)
    nats = sum(result.nats for result in scores[2:])
    assert second.nats_per_token == pytest.approx(nats / 6)
