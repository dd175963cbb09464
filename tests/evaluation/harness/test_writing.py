"""Writing by the harness's settings, one text at a time and in batches. Does not need it."""

import pytest

from sparsek_jax.evaluation.harness.writing import WritingSettings, write, writing_settings
from sparsek_jax.generation.engine import Engine
from sparsek_jax.generation.sampling import Sampling
from tests.generation.models import BOS, EOS, TOKENIZER, Chain, words


def settings(max_gen_toks=8, until=(), do_sample=False, seed=0, **others):
    generation = {"max_gen_toks": max_gen_toks, "until": list(until), "do_sample": do_sample}
    return writing_settings(generation | others, seed=seed)


def written(chain, prompts, all_settings, batch_size):
    ids = [[BOS, *TOKENIZER.encode(prompt).tolist()] for prompt in prompts]
    texts = dict(write(Engine(chain, TOKENIZER), ids, all_settings, batch_size=batch_size))
    assert sorted(texts) == list(range(len(prompts)))
    return [texts[i] for i in range(len(prompts))]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_end_as_asked_in_any_batch(batch_size):
    """After "a" the model writes "bcdefgh"..., after "1" it writes "23" and ends the document."""
    chain = Chain(words("abcdefghijklmnopqrst", ["1", "2", "3", EOS]))
    cases = [
        ("a", settings(until=["e"]), "bcd"),
        ("a", settings(until=["never", "cd", "bcx"]), "b"),
        ("long beginning, a", settings(until=["e"]), "bcd"),
        ("1", settings(until=["e"]), "23"),
        ("a", settings(max_gen_toks=3), "bcd"),
        # What the prompt holds stops nothing.
        ("bc a", settings(until=["bc a", "h"]), "bcdefg"),
        ("a", settings(until=["b"]), ""),
        ("z" * 100 + "a", settings(until=["e"]), "bcd"),
    ]
    prompts, all_settings, texts = zip(*cases, strict=True)
    assert written(chain, prompts, all_settings, batch_size) == list(texts)


def test_draws_differ_between_rows_and_batches_but_not_between_runs():
    chain = Chain({(ord(a), ord(b)): 0.0 for a in "ab" for b in "ab"})
    sampled = settings(max_gen_toks=24, do_sample=True, temperature=1.0)
    texts = written(chain, ["a"] * 5, [sampled] * 5, batch_size=2)
    assert len(set(texts)) == 5
    assert {len(text) for text in texts} == {24}
    assert written(chain, ["a"] * 5, [sampled] * 5, batch_size=2) == texts
    other = settings(max_gen_toks=24, do_sample=True, temperature=1.0, seed=9)
    assert written(chain, ["a"] * 5, [other] * 5, batch_size=2) != texts


def test_settings_mean_what_the_harness_says():
    greedy = Sampling(temperature=0, seed=3)
    assert settings(seed=3, until=["\n", "", None]) == WritingSettings(8, greedy, ("\n",))
    assert settings(seed=3, temperature=0.7).sampling == greedy
    assert settings(seed=3, do_sample=True).sampling == greedy
    assert settings(do_sample=True, temperature=0.7, top_k=5, top_p=0.9).sampling == Sampling(
        temperature=0.7, top_k=5, top_p=0.9
    )
    assert settings(do_sample=True, temperature=1, top_k=0, num_beams=1).sampling == Sampling()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs has num_beams=4; expected none but until"),
        ({"max_length": 9}, "generation_kwargs has max_length=9"),
        ({"max_gen_toks": 0}, "max_gen_toks=0; expected at least 1"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0; expected"),
    ],
)
def test_what_cannot_be_done_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)
