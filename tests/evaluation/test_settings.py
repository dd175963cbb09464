import re

import ml_collections
import pytest

from sparsek_jax.evaluation.settings import evaluation_settings
from sparsek_jax.training.config import ConfigError, default_config


def settings(asked=None, trained=None, overrides=None):
    """Settings of a recipe and a run that differ from the defaults in the given fields."""
    config, saved = default_config(), default_config()
    config.update_from_flattened_dict(asked or {})
    saved.update_from_flattened_dict(trained or {})
    saved = ml_collections.ConfigDict(saved.to_dict())
    return evaluation_settings(config, saved, asked or () if overrides is None else overrides)


def test_a_run_is_evaluated_as_it_was_trained():
    trained = {"attention.kind": "window", "data.seq_len": 64, "data.glob": "x/*.txt"}
    result = settings({}, trained)
    assert result.config.attention.kind == "window"
    assert (result.config.data.seq_len, result.config.data.glob) == (64, "x/*.txt")
    assert (result.changes, result.notes()) == ({}, [])
    assert result.label("corpus") == "window"


@pytest.mark.parametrize(
    ("field", "value", "label"),
    [
        ("attention.kind", "dense", "dense"),
        ("attention.pattern", ("window", "sparsek"), "window+sparsek"),
        ("attention.num_selected", 7, "sparsek_num_selected=7"),
        ("attention.sliding_window", 9, "sparsek_sliding_window=9"),
        ("attention.gating", "straight_through", "sparsek_gating=straight_through"),
        ("attention.implementation", "reference", "sparsek_implementation=reference"),
        ("data.seq_len", 77, "sparsek_seq_len=77"),
        ("data.packing", "continuous", "sparsek_packing=continuous"),
        ("data.glob", "/books/*.txt", "sparsek_books-1f"),
        ("data.root", "/data", "sparsek"),
        ("train.recurrent", True, "sparsek_recurrent=True"),
    ],
)
def test_what_the_same_weights_can_do_may_be_overridden(field, value, label):
    result = settings({field: value})
    section, name = field.split(".")
    assert result.config[section][name] == value
    assert list(result.changes) == [field]
    assert result.label("books-1f") == label
    assert [note.split("=")[0] for note in result.notes()] == [field]


def test_eval_fields_are_those_asked_for():
    result = settings({"eval.batches": 3}, {"eval.batches": 5, "eval.batch_size": 2}, overrides=())
    assert (result.config.eval.batches, result.config.eval.batch_size) == (3, 8)
    assert result.changes == {}


def test_the_mesh_of_the_run_does_not_matter():
    result = settings({"mesh.tensor": 2}, {"mesh.fsdp": 4}, overrides=())
    assert (result.changes, result.notes()) == ({}, [])


def test_kernels_that_this_machine_has_not_are_refused():
    message = "attention.implementation='mosaic_gpu' with model.dtype='float32': "
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings({}, {"attention.implementation": "mosaic_gpu"}, overrides=())
    run = {"attention.implementation": "mosaic_gpu", "attention.kind": "window"}
    assert settings({}, run, overrides=()).changes == {}


def test_runs_from_before_rows_could_go_on_did_not():
    saved = default_config().to_dict()
    del saved["train"]["recurrent"]
    config = default_config()
    config.train.recurrent = True
    result = evaluation_settings(config, ml_collections.ConfigDict(saved), ["train.recurrent"])
    assert result.changes == {"train.recurrent": (True, False)}


def test_every_other_difference_is_named_with_both_values():
    message = "model.d_model=512 (the run: 256), train.steps=1000 (the run: 7); expected"
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings({"model.d_model": 512}, {"train.steps": 7})
    with pytest.raises(ConfigError, match=r"attention\.rope_theta=10000\.0 \(the run: 5\.0\)"):
        settings({}, {"attention.rope_theta": 5.0})


def test_a_field_that_came_later_has_its_default():
    config, saved = default_config(), default_config()
    with saved.unlocked():
        del saved.model.norm
    assert evaluation_settings(config, saved).config.model.norm == "rmsnorm"
    with pytest.raises(ConfigError, match=r"model\.norm='rmsnorm' of the saved"):
        evaluation_settings(saved, config)


def test_a_kind_is_not_hidden_by_the_run_s_pattern():
    trained = {"attention.pattern": ("window", "sparsek")}
    result = settings({"attention.kind": "dense"}, trained)
    assert result.config.attention.pattern == ()
    assert result.label("corpus") == "dense"
    assert any("attention.pattern=[]" in note for note in result.notes())


def test_a_larger_validation_split_holds_training_documents():
    leak = "trained on are among"
    assert leak in " ".join(settings({"data.validation_fraction": 0.5}).notes())
    assert leak not in " ".join(settings({"data.validation_fraction": 0.01}).notes())


@pytest.mark.parametrize(
    ("trained", "asked", "allowed"),
    [
        ("bytes", "bpe:300", False),
        ("bpe:300", "bpe:400", False),
        ("bpe:300", "bytes", False),
        ("bytes", "/new/tokenizer.json", False),
        ("/old/tokenizer.json", "bpe:300", False),
        ("/old/tokenizer.json", "bytes", False),
        ("/old/tokenizer.json", "/new/tokenizer.json", True),
    ],
)
def test_only_the_place_of_a_tokenizer_may_change(trained, asked, allowed):
    asked, trained = {"data.tokenizer": asked}, {"data.tokenizer": trained}
    if allowed:
        assert settings(asked, trained).config.data.tokenizer == asked["data.tokenizer"]
    else:
        with pytest.raises(ConfigError, match=r"data\.tokenizer=.*but the run was trained with"):
            settings(asked, trained)


@pytest.mark.parametrize(
    ("field", "value"),
    [("eval.batch_size", 0), ("eval.batches", -1), ("eval.position_buckets", 0)],
)
def test_impossible_eval_fields_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}; expected at least"):
        settings({field: value})


def test_arguments_are_left_alone():
    config, saved = default_config(), default_config()
    saved.attention.kind = "dense"
    evaluation_settings(config, saved)
    assert (config.attention.kind, saved.attention.kind) == ("sparsek", "dense")
