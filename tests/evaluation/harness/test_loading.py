"""Which model the harness's arguments give. Does not need the harness."""

import importlib.util

import pytest

from sparsek_jax.evaluation.harness import register
from sparsek_jax.evaluation.harness.loading import load_for_harness
from sparsek_jax.training.config import ConfigError


def test_attention_may_be_another(run):
    loaded = load_for_harness(run.workdir, {})
    attention = loaded.run.model.config.attention
    assert (attention.kind, attention.num_selected, attention.sliding_window) == ("sparsek", 4, 3)
    assert (loaded.run.step, loaded.trained_length) == (2, 32)
    # As suits this machine, unless it is asked for.
    note = "attention.implementation=''; the weights were trained with 'reference'."
    assert loaded.notes == (note,)
    assert load_for_harness(run.workdir, {"implementation": "reference"}).notes == ()
    asked = {"kind": "random", "num_selected": 2, "sliding_window": 5, "implementation": "xla"}
    loaded = load_for_harness(str(run.workdir), asked, step=2)
    attention = loaded.run.model.config.attention
    assert {name: getattr(attention, name) for name in asked} == asked
    assert "attention.kind='random'; the weights were trained with 'sparsek'." in loaded.notes
    pattern = load_for_harness(run.workdir, {"pattern": "window+sparsek"})
    assert pattern.run.model.config.attention.pattern == ("window", "sparsek")


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"num_selectd": 4}, "num_selectd=4 is not an argument.*did you mean num_selected?"),
        ({"num_heads": 4}, "num_heads=4 is not an argument"),
        ({"num_selected": "many"}, "attention.num_selected='many'; expected a value like 4"),
        ({"kind": "wide"}, "kind='wide'"),
    ],
)
def test_impossible_arguments_are_named(run, attention, message):
    with pytest.raises(ConfigError, match=message):
        load_for_harness(run.workdir, attention)


def test_a_missing_harness_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm_eval is not installed; expected .*pip install"):
        register()
