import numpy as np
import pytest

from sparsek_jax.evaluation.tasks.task import Example
from sparsek_jax.evaluation.tasks.written import share_found, written_credits
from sparsek_jax.generation.engine import Engine, NonFiniteLogitsError
from tests.generation.models import BOS, EOS, TOKENIZER, Chain, words


@pytest.mark.parametrize(
    ("text", "references", "share"),
    [
        (" 1234567", ("1234567",), 1),
        (" 123456", ("1234567",), 0),
        ("QXW, ABC and\nfour", ("ABC", "QXW"), 1),
        ("abc qxw", ("ABC", "QXW", "RST", "UVW"), 0.5),
        ("It is an\nOtter", ("otter", "Hen"), 0.5),
        ("", ("otter",), 0),
    ],
)
def test_share_of_the_references_in_any_order_and_case(text, references, share):
    assert share_found(text, references) == share


def example(prompt, references, max_tokens=8):
    ids = np.array([BOS, *TOKENIZER.encode(prompt)], np.int32)
    answer = TOKENIZER.encode(references[0])
    return Example(ids, answer, references=references, max_tokens=max_tokens)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_credit_is_for_what_is_written(batch_size):
    """After "a" the model writes "bcdefgh"..., after "1" it writes "23" and ends the document."""
    chain = Chain(words("abcdefghijklmnopqrst", ["1", "2", "3", EOS]))
    examples = [
        example("a", ("bc", "de", "never")),
        example("1", ("23", "4")),
        example("xa", ("i", "j")),
        # What the prompt holds was not written.
        example("1", ("1",)),
        example("a", ("abc",)),
    ]
    credits = written_credits(Engine(chain, TOKENIZER), examples, batch_size=batch_size)
    assert list(credits) == pytest.approx([2 / 3, 1 / 2, 1 / 2, 0, 0])


def test_writing_ends_when_all_is_found():
    """A document that would be NaN further on is none of the scorer's business."""
    chain = Chain(words("abcdefgh"), broken=[ord("h")])
    (credit,) = written_credits(
        Engine(chain, TOKENIZER, block_size=2), [example("a", ("bc",), 50)], batch_size=1
    )
    assert credit == 1
    with pytest.raises(NonFiniteLogitsError):
        list(
            written_credits(
                Engine(chain, TOKENIZER, block_size=2), [example("a", ("z",), 50)], batch_size=1
            )
        )
