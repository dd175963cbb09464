import pytest

from sparsek_jax.data import default_data_config, prepare, validate_data_config


def test_defaults_are_valid():
    validate_data_config(default_data_config())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seq_len", 0),
        ("max_documents", -1),
        ("shuffle_window", 0),
        ("packing", "pad"),
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("validation_fraction", float("nan")),
        ("root", ""),
        ("tokenizer", ""),
        ("tokenizer", "byte"),
        ("tokenizer", "bpe:"),
        ("tokenizer", "bpe:257"),
        ("tokenizer", "/no/such/tokenizer.json"),
    ],
)
def test_impossible_values_name_field_and_value_and_write_nothing(config, tmp_path, field, value):
    config[field] = value
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"data\.{field}=") as error:
        prepare(config)
    assert repr(value) in str(error.value)
    assert "expected" in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_sources_are_refused(config):
    config.tfds = "some_dataset"
    with pytest.raises(ValueError, match=r"data\.glob=.* and data\.tfds='some_dataset'"):
        validate_data_config(config)


@pytest.mark.parametrize("field", ["tfds_split", "tfds_text_field"])
def test_tfds_fields_must_be_set(config, field):
    config.glob, config.tfds = "", "some_dataset"
    config[field] = ""
    with pytest.raises(ValueError, match=rf"data\.{field}=''"):
        validate_data_config(config)
