"""Every recipe is a configuration that could run on one device."""

import importlib
import pathlib

import pytest

from sparsek_jax.training.config import validate_config

RECIPES = sorted(path.stem for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
# These take a directory to start from, whose configuration they change.
OF_DIRECTORIES = {"of_run", "finetune_smollm2"}


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - OF_DIRECTORIES))
def test_recipes_are_possible(recipe):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    validate_config(config, device_count=1)


def test_recall_goes_on_from_short_rows():
    get_config = importlib.import_module("configs.recall").get_config
    short, long = get_config(), get_config("runs/short")
    validate_config(long, device_count=1)
    assert long.init_from == "runs/short"
    assert (short.model, short.data.tokenizer) == (long.model, long.data.tokenizer)
    last = long.data.recall.spread + long.data.recall.gap
    assert last - long.data.recall.spread > long.attention.sliding_window


def test_long_code_goes_on_from_short_rows():
    get_config = importlib.import_module("configs.long_code").get_config
    short, long = get_config(), get_config("runs/short")
    validate_config(long, device_count=1)
    assert long.init_from == "runs/short"
    assert (short.model, short.data.tokenizer) == (long.model, long.data.tokenizer)
    attention = long.attention
    keys = [
        attention.sliding_window + (kind == "sparsek") * attention.num_selected
        for kind in attention.pattern
    ]
    # The first part has all that a window of the same budget could see.
    assert (short.attention.kind, tuple(short.attention.pattern)) == ("dense", ())
    assert sum(keys) / len(keys) == short.data.seq_len
