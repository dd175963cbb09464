import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsek_jax.evaluation.tasks import TASKS, find_tasks
from sparsek_jax.evaluation.tasks.task import encode_example, most_units

# Most bytes, and so most tokens, of a unit of filler.
UNIT_BYTES = {"passkey": len(" There and back again."), "key_value": 80}
FILLER = re.compile(r"(The grass is|The sky is|The sun is|Here we|There and)[a-z ]+\.")
PAIR = re.compile(r'"([0-9a-f-]{36})": "([0-9a-f-]{36})"')


def make(task, tokenizer, length, depth, seed):
    return task.make(tokenizer, length, depth, np.random.default_rng(seed))


# Fixtures are the same in every example.
shared = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
lengths = st.integers(420, 3000)
depths = st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0)) | st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)


@shared
@given(length=lengths, depth=depths, seed=seeds)
def test_prompts_are_as_long_as_whole_units_allow(task, tokenizer, length, depth, seed):
    example = make(task, tokenizer, length, depth, seed)
    # A unit more, of at most so many tokens, would not fit.
    assert length - UNIT_BYTES[task.name] - 1 <= len(example.prompt) <= length
    assert example.prompt[0] == tokenizer.bos_id
    assert len(example.answer) > 0


@shared
@given(length=lengths, depth=depths, seed=seeds)
def test_what_is_asked_for_is_at_its_depth(task, tokenizer, length, depth, seed):
    """The parts of a prompt in its own words; and the answer is that of the question."""
    example = make(task, tokenizer, length, depth, seed)
    text = tokenizer.decode(np.concatenate([example.prompt, example.answer]))
    answer = tokenizer.decode(example.answer)
    if task.name == "passkey":
        answer = answer.removeprefix(" ")
        needle = re.search(rf"The pass key is {answer}\. Remember it\. {answer} is the", text)
        before = len(FILLER.findall(text[: needle.start()]))
        units = len(FILLER.findall(text))
        assert text.endswith(f"\nWhat is the pass key? The pass key is {answer}")
    else:
        pairs = PAIR.findall(text[: text.index("Key: ")])
        key = re.search(r'Key: "(.*)"', text)[1]
        before, units = [k for k, _ in pairs].index(key), len(pairs) - 1
        assert dict(pairs)[key] == answer
        assert text.endswith(f'Corresponding value: "{answer}')
    assert before == round(depth * units)


@shared
@given(length=lengths, depth=depths, seed=seeds)
def test_examples_depend_on_the_seed_and_answers_not_on_the_depth(
    task, tokenizer, length, depth, seed
):
    example, again = (make(task, tokenizer, length, depth, seed) for _ in range(2))
    np.testing.assert_array_equal(example.prompt, again.prompt)
    np.testing.assert_array_equal(example.answer, again.answer)
    elsewhere = make(task, tokenizer, length, 1 - depth, seed)
    np.testing.assert_array_equal(example.answer, elsewhere.answer)
    other = make(task, tokenizer, length, depth, seed + 1)
    assert not np.array_equal(example.prompt, other.prompt)


def test_tokens_are_those_of_the_whole_text(task, tokenizer):
    example = make(task, tokenizer, 500, 0.5, 0)
    whole = np.concatenate([example.prompt[1:], example.answer])
    np.testing.assert_array_equal(whole, tokenizer.encode(tokenizer.decode(whole)))


def test_a_token_across_the_border_belongs_to_the_answer(bpe):
    text = "The pass key is"
    assert len(bpe.encode(text)) < len(text)
    example = encode_example(bpe, text[:-1], text[-1])
    assert bpe.decode(example.prompt) + bpe.decode(example.answer) == text
    np.testing.assert_array_equal([*example.prompt[1:], *example.answer], bpe.encode(text))


def test_too_short_a_length_names_what_is_needed(task, tokenizer):
    with pytest.raises(ValueError, match=r"length=30; expected at least \d+ tokens") as error:
        make(task, tokenizer, 30, 0.5, 0)
    needed = int(re.search(r"least (\d+)", str(error.value))[1])
    assert len(make(task, tokenizer, needed, 0.5, 0).prompt) <= needed


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    fixed=st.integers(0, 5),
    length=st.integers(14, 300),
)
def test_most_units_is_the_largest_that_fits(sizes, fixed, length):
    sizes = [*sizes, *[5] * 300]

    def num_tokens(units):
        return fixed + sum(sizes[:units])

    units = most_units(num_tokens, length)
    assert num_tokens(units) <= length
    assert num_tokens(units + 1) > length


def test_unknown_names_are_refused():
    assert [task.name for task in find_tasks(["key_value", "passkey", "key_value"])] == [
        "key_value",
        "passkey",
    ]
    with pytest.raises(ValueError, match=r"tasks has 'pass_key'; .* did you mean passkey"):
        find_tasks(["passkey", "pass_key"])
    with pytest.raises(ValueError, match=f"expected some of {', '.join(TASKS)}"):
        find_tasks([])
