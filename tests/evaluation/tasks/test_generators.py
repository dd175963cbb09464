import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsek_jax.evaluation.tasks import TASKS, find_tasks
from sparsek_jax.evaluation.tasks.task import encode_example, most_units

# Lengths that are enough, and most tokens of a unit of filler, both in bytes.
LEAST = {
    "passkey": 420,
    "key_value": 420,
    "niah_single_1": 520,
    "niah_multikey_2": 520,
    "niah_multikey_3": 620,
    "vt": 1750,
    "cwe": 1900,
    "fwe": 700,
    "induction": 26,
    "mqar": 17,
}
UNIT = {
    "passkey": len(" There and back again."),
    "key_value": 80,
    "niah_single_1": 90,
    "niah_multikey_2": 90,
    "niah_multikey_3": 122,
    "vt": 91,
    "cwe": 75,
    "fwe": 40,
    "induction": 0,
    "mqar": 1,
}
FILLER = re.compile(r"(The grass is|The sky is|The sun is|Here we|There and)[a-z ]+\.")
PAIR = re.compile(r'"([0-9a-f-]{36})": "([0-9a-f-]{36})"')
NEEDLE = re.compile(r"One of the special magic (number|uuid)s for (\S+) is: (\S+)\.\n")


def enough(task, more):
    length = LEAST[task.name] + more
    # From 4,096 tokens on, words are repeated more often.
    return length + 2200 if task.name == "cwe" and length >= 4096 else length


def make(task, tokenizer, length, depth, seed):
    return task.make(tokenizer, length, depth, np.random.default_rng(seed))


# Fixtures are the same in every example.
shared = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
more = st.integers(0, 2500)
depths = st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0)) | st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)


@shared
@given(more=more, depth=depths, seed=seeds)
def test_prompts_are_as_long_as_whole_units_allow(task, tokenizer, more, depth, seed):
    length = enough(task, more)
    example = make(task, tokenizer, length, depth, seed)
    # A unit more, of at most so many tokens, would not fit.
    assert length - UNIT[task.name] - 1 <= len(example.prompt) <= length
    assert example.prompt[0] == tokenizer.bos_id
    assert len(example.answer) > 0


def text_of(task, tokenizer, more, depth, seed):
    """All of an example as text, and its answer."""
    example = make(task, tokenizer, enough(task, more), depth, seed)
    text = tokenizer.decode(np.concatenate([example.prompt, example.answer]))
    return text, tokenizer.decode(example.answer).removeprefix(" ")


@shared
@given(more=more, depth=depths, seed=seeds)
def test_passkey_is_at_its_depth(tokenizer, more, depth, seed):
    text, answer = text_of(TASKS["passkey"], tokenizer, more, depth, seed)
    needle = re.search(rf"The pass key is {answer}\. Remember it\. {answer} is the", text)
    before = len(FILLER.findall(text[: needle.start()]))
    assert before == round(depth * len(FILLER.findall(text)))
    assert text.endswith(f"\nWhat is the pass key? The pass key is {answer}")


@shared
@given(more=more, depth=depths, seed=seeds)
def test_key_value_is_at_its_depth(tokenizer, more, depth, seed):
    text, answer = text_of(TASKS["key_value"], tokenizer, more, depth, seed)
    pairs = PAIR.findall(text[: text.index("Key: ")])
    key = re.search(r'Key: "(.*)"', text)[1]
    assert [k for k, _ in pairs].index(key) == round(depth * (len(pairs) - 1))
    assert dict(pairs)[key] == answer
    assert text.endswith(f'Corresponding value: "{answer}')


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
@shared
@given(more=more, depth=depths, seed=seeds)
def test_needle_is_at_its_depth(name, tokenizer, more, depth, seed):
    text, answer = text_of(TASKS[name], tokenizer, more, depth, seed)
    needles = NEEDLE.findall(text)
    asked = re.search(r"What is the special magic (\S+) for (\S+) mentioned", text)
    values = {key: value for kind, key, value in needles if kind == asked[1]}
    assert len(values) == len(needles)  # every key once
    assert values[asked[2]] == answer
    assert text.endswith(f"{asked[0][8:].capitalize()} in the provided text is {answer}")
    lines = [line for line in text.split("\n") if line.startswith(("One of the", "The grass"))]
    (at,) = [i for i, line in enumerate(lines) if f" {asked[2]} " in line]
    assert at == round(depth * (len(lines) - 1))
    assert len(needles) == (1 if name == "niah_single_1" else len(lines))
    pattern = r"\d{7}" if asked[1] == "number" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert all(re.fullmatch(pattern, value) for value in values.values())


@shared
@given(more=more, seed=seeds)
def test_chain_of_variables_leads_to_all_answers(tokenizer, more, seed):
    text, answer = text_of(TASKS["vt"], tokenizer, more, None, seed)
    solved, asked = text.split("\n\nMemorize")
    for part, size in ((solved, 3), (asked, 5)):
        (value,) = re.findall(r"assigned the value (\d{5}) in", part)
        found = {value}
        # In the order in which they stand.
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", part):
            assert source in found
            found.add(name)
        names = part.rpartition("they are: ")[2].split()
        assert {value, *names} == found
        assert [len(name) for name in names] == [size] * 5
    assert answer.split() == names


@shared
@given(more=more.map(lambda x: x if x < 2000 else 4 * x), seed=seeds)
def test_common_words_are_those_that_stand_out(tokenizer, more, seed):
    text, answer = text_of(TASKS["cwe"], tokenizer, more, None, seed)
    is_long = LEAST["cwe"] + more >= 4096
    parts = [part.partition("Question:") for part in text.split("Memorize")[1:]]
    expected = ((10, 3), (30, 3)) if is_long else ((3, 1), (6, 1))
    for (entries, _, question), (common, other) in zip(parts, expected, strict=True):
        numbered = re.findall(r"(\d+)\. ([a-z]+)", entries)
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
        counts = Counter(word for _, word in numbered)
        asked = re.findall(r"\d+\. ([a-z]+)", question)
        assert len(asked) == 10
        assert all(n == (common if word in asked else other) for word, n in counts.items())
    assert set(answer.split()[1::2]) == set(asked)


@shared
@given(more=more.map(lambda x: x if x < 2000 else 4 * x), seed=seeds)
def test_frequent_words_are_the_most_frequent(tokenizer, more, seed):
    text, answer = text_of(TASKS["fwe"], tokenizer, more, None, seed)
    words = text.partition("coded words. ")[2].partition("\nQuestion")[0].split()
    (dots, zeroth), *coded = Counter(words).most_common()
    assert dots == "..."
    assert [word for word, _ in coded[:3]] == answer.split()
    counts = [zeroth, *(count for _, count in coded)]
    assert len(counts) == 1 or counts[2] > counts[3] > (counts[4] if len(counts) > 4 else 0)
    # As 1 / rank squared, up to rounding down.
    for rank, count in enumerate(counts, start=1):
        assert abs(zeroth / rank**2 - count) <= 1


@shared
@given(more=more, depth=depths, seed=seeds)
def test_what_is_repeated_is_at_its_depth(tokenizer, more, depth, seed):
    example = make(TASKS["induction"], tokenizer, 26 + more, depth, seed)
    *body, cue = np.split(example.prompt[1:], [len(example.prompt) - 9])
    start = round(depth * (len(body[0]) - 16))
    np.testing.assert_array_equal(body[0][start : start + 8], cue)
    np.testing.assert_array_equal(body[0][start + 8 : start + 16], example.answer)
    assert (tokenizer.byte_lengths[example.prompt[1:]] > 0).all()


@shared
@given(more=more, seed=seeds)
def test_queries_ask_for_the_values_of_pairs(tokenizer, more, seed):
    example = make(TASKS["mqar"], tokenizer, 17 + more, None, seed)
    count = len(example.queries)
    num_ids = np.count_nonzero(tokenizer.byte_lengths)
    assert count == min((16 + more) // 2 * 2 // 16, num_ids // 4)
    pairs = dict(example.prompt[1 : 1 + 2 * count].reshape(count, 2).tolist())
    asked = example.prompt[example.queries].tolist()
    assert sorted(asked) == sorted(pairs)
    assert [pairs[key] for key in asked] == example.answer.tolist()
    assert (np.diff(example.queries) > 0).all()
    assert (tokenizer.byte_lengths[example.prompt[1:]] > 0).all()


@shared
@given(more=more, depth=depths, seed=seeds)
def test_examples_depend_on_the_seed_and_answers_not_on_the_depth(
    task, tokenizer, more, depth, seed
):
    length = LEAST[task.name] + more
    example, again = (make(task, tokenizer, length, depth, seed) for _ in range(2))
    np.testing.assert_array_equal(example.prompt, again.prompt)
    np.testing.assert_array_equal(example.answer, again.answer)
    assert example.references == again.references
    elsewhere = make(task, tokenizer, length, 1 - depth if task.has_depth else None, seed)
    np.testing.assert_array_equal(example.answer, elsewhere.answer)
    assert task.has_depth or np.array_equal(example.prompt, elsewhere.prompt)
    other = make(task, tokenizer, length, depth, seed + 1)
    assert not np.array_equal(example.prompt, other.prompt)


@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("induction", "mqar")])
def test_the_answer_holds_what_is_looked_for(name, tokenizer):
    example = make(TASKS[name], tokenizer, 3000, 0.5, 0)
    answer = tokenizer.decode(example.answer)
    assert all(reference in answer for reference in example.references)
    if example.references:
        assert example.max_tokens >= len(example.answer)


# Random tokens are none of any text.
@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("induction", "mqar")])
def test_tokens_are_those_of_the_whole_text(name, tokenizer):
    example = make(TASKS[name], tokenizer, 3000, 0.5, 0)
    whole = np.concatenate([example.prompt[1:], example.answer])
    np.testing.assert_array_equal(whole, tokenizer.encode(tokenizer.decode(whole)))


def test_a_token_across_the_border_belongs_to_the_answer(bpe):
    text = "The pass key is"
    assert len(bpe.encode(text)) < len(text)
    example = encode_example(bpe, text[:-1], text[-1])
    assert bpe.decode(example.prompt) + bpe.decode(example.answer) == text
    np.testing.assert_array_equal([*example.prompt[1:], *example.answer], bpe.encode(text))


def test_too_short_a_length_names_what_is_needed(task, tokenizer):
    with pytest.raises(ValueError, match=r"length=9; expected at least \d+ tokens") as error:
        make(task, tokenizer, 9, 0.5, 0)
    needed = int(re.search(r"least (\d+)", str(error.value))[1])
    assert len(make(task, tokenizer, needed, 0.5, 0).prompt) <= needed
    with pytest.raises(ValueError, match=rf"length={needed - 1}; expected at least {needed} "):
        make(task, tokenizer, needed - 1, 0.5, 0)


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
