"""Impossible configurations are named before anything is compiled, read or written."""

import math
import re

import pytest

from sparsek_jax.training.config import ConfigError, default_config, mesh_shape, validate_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("model.vocab_size", -1),
        ("model.num_layers", 0),
        ("model.norm", "batchnorm"),
        ("model.remat", "some"),
        ("model.dtype", "float8"),
        ("attention.kind", "linear"),
        ("attention.pattern", ("window", "linear")),
        ("attention.num_kv_heads", 3),
        ("attention.num_selected", 0),
        ("attention.sliding_window", -1),
        ("attention.gating", "hard"),
        ("attention.implementation", "cudnn"),
        ("attention.rope_theta", 0.0),
        ("attention.slope", -1e-6),
        ("data.seq_len", 0),
        ("data.packing", "none"),
        ("data.tokenizer", "words"),
        ("data.validation_fraction", 1.0),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", math.inf),
        ("optimizer.learning_rate", math.nan),
        ("optimizer.warmup_steps", 1000),
        ("optimizer.end_fraction", 1.5),
        ("optimizer.b2", 1.0),
        ("optimizer.eps", math.inf),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.scorer_learning_rate", -1.0),
        ("optimizer.freeze_steps", -1),
        ("optimizer.layer_decay", 0.0),
        ("optimizer.layer_decay", 1.5),
        ("optimizer.clip_norm", -1.0),
        ("optimizer.z_loss", math.inf),
        ("optimizer.accumulate", 3),
        ("mesh.data", 3),
        ("mesh.fsdp", 0),
        ("train.steps", 0),
        ("train.batch_size", 0),
        ("train.loss_chunk", 0),
        ("train.eval_every", -1),
        ("train.checkpoint_every", 0),
        ("train.keep", 0),
        ("train.max_bad_steps", 0),
        ("sample.temperature", -1.0),
        ("eval.batch_size", 0),
        ("eval.position_buckets", 0),
        ("eval.position_edges", (8, 4)),
        ("eval.task_lengths", (0,)),
        ("eval.task_depths", (2.0,)),
    ],
)
def test_impossible_values_are_named(field, value):
    config = default_config()
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
    expected = "attention.num_heads=4; expected a multiple of attention.num_kv_heads=3"
    with pytest.raises(ConfigError) as error:
        validate_config(config, device_count=1)
    named = expected if field == "attention.num_kv_heads" else f"{field}={value!r}"
    assert named in str(error.value)
    assert "expected" in str(error.value) or "takes" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("train.batch_size", 6, "train.batch_size=6"),
        ("attention.num_kv_heads", 1, "attention.num_kv_heads=1"),
        ("model.mlp_dim", 769, "model.mlp_dim=769"),
        ("model.d_model", 257, "model.d_model=257"),
    ],
)
def test_what_the_mesh_does_not_divide_is_named(field, value, named):
    config = default_config()
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.attention.num_kv_heads = 2
    section, _, name = field.rpartition(".")
    validate_config(config, device_count=8)
    config[section][name] = value
    with pytest.raises(ConfigError, match=named):
        validate_config(config, device_count=8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"train.recurrent": False, "train.recurrent_gradient": True},
            "train.recurrent_gradient=True with train.recurrent=False; expected",
        ),
        ({"attention.kind": "dense"}, "attention.kind='dense' with train.recurrent=True; expected"),
        ({"attention.kind": "sparsek_linear"}, "attention.kind='sparsek_linear' with"),
        ({"attention.pattern": ("sparsek", "gated_linear")}, "attention.pattern=('sparsek', 'gat"),
        ({"data.packing": "continuous"}, "data.packing='continuous' with train.recurrent=True"),
        (
            {"data.recall.num_pairs": 4, "data.tokenizer": "ids:64"},
            "data.recall.num_pairs=4 with train.recurrent=True; expected 0",
        ),
    ],
)
def test_what_rows_cannot_go_on_with_is_named(changes, named):
    config = default_config()
    config.train.recurrent = True
    validate_config(config, device_count=1)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=re.escape(named)):
        validate_config(config, device_count=1)


def test_rows_must_be_shared_by_the_processes():
    config = default_config()
    config.mesh.update(data=2, tensor=2)
    validate_config(config, device_count=4, process_count=2)
    config.mesh.update(data=1, tensor=4)
    with pytest.raises(ConfigError, match="2 processes"):
        validate_config(config, device_count=4, process_count=2)


def test_mesh_takes_the_rest():
    config = default_config()
    config.mesh.update(data=-1, fsdp=2, tensor=2)
    assert mesh_shape(config, 8) == {"data": 2, "fsdp": 2, "tensor": 2}
    config.mesh.fsdp = -1
    with pytest.raises(ConfigError, match=r"mesh\.fsdp=-1 beside mesh\.data=-1"):
        mesh_shape(config, 8)


def test_a_recipe_cannot_add_a_field():
    with pytest.raises(AttributeError, match="stepz"):
        default_config().train.stepz = 3
