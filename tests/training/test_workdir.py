"""A config.json that was changed by hand, or is another version's: read, or named in one line."""

import json
import re

import pytest

from sparsek_jax.training.config import ConfigError, default_config
from sparsek_jax.training.workdir import current_config, load_config


def saved(directory, change):
    """A directory whose config.json is that of a default run, changed by a function."""
    content = json.loads(default_config().to_json())
    change(content)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def set_to(field, value):
    """A change of one field or section."""

    def change(content):
        *sections, name = field.split(".")
        for section in sections:
            content = content[section]
        content[name] = value

    return change


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", 3, "model=3; expected fields model.*"),
        ("train", None, "train=None; expected fields train.*"),
        ("data.recall", [], "data.recall=[]; expected fields data.recall.*"),
        ("model.d_model", "x", "model.d_model='x'; expected int, as in 256"),
        ("model.d_model", 256.0, "model.d_model=256.0; expected int"),
        ("model.d_model", True, "model.d_model=True; expected int"),
        ("model.scan_layers", 1, "model.scan_layers=1; expected bool"),
        ("model.d_model", {"x": 1}, "model.d_model.x=1, a field that this version has not"),
        ("attention.heads", 3, "attention.heads=3, a field that this version has not"),
        ("rows", [], "rows=[], a field that this version has not"),
        ("data.tokenizer", None, "data.tokenizer=None; expected str, as in 'bytes'"),
        ("seed", "0", "seed='0'; expected int"),
        ("model", {}, "it has no model.d_model, model.mlp_dim, model.num_layers, model.vocab_size"),
    ],
)
def test_a_field_that_cannot_be_is_named(field, value, message, tmp_path):
    saved(tmp_path, set_to(field, value))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json is no configuration of a run: ")


@pytest.mark.parametrize("name", ["model.d_model", "attention.pattern", "data.tokenizer"])
def test_a_model_without_a_size_is_not_loaded(name, tmp_path):
    section, field = name.split(".")
    saved(tmp_path, lambda content: content[section].pop(field))
    with pytest.raises(ConfigError, match=f"it has no {name}; expected another --workdir"):
        load_config(tmp_path)


def test_an_older_version_may_have_had_fewer_fields(tmp_path):
    def change(content):
        del content["attention"]["slope"], content["sample"]
        content["optimizer"]["learning_rate"] = 1

    config = load_config(saved(tmp_path, change))
    assert "slope" not in config.attention
    assert config.optimizer.learning_rate == 1
    assert current_config(tmp_path).attention.slope == default_config().attention.slope
