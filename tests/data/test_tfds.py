import json
import logging

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparsek_jax.data import default_data_config, prepare
from sparsek_jax.data.sources import resolve_source

STORIES = [f"Story number {i}: once upon a time, {'x' * i} the end." for i in range(20)]


class TinyStoriesForTests(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # see sparsek_jax/data/builder.py

    def _info(self):
        features = {"text": tfds.features.Text(), "stars": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, story in enumerate([*STORIES, ""]):
            yield i, {"text": story, "stars": i}


@pytest.fixture
def config(tmp_path):
    config = default_data_config()
    config.tfds = "tiny_stories_for_tests"
    config.tfds_data_dir = str(tmp_path / "tfds")
    config.root = str(tmp_path / "prepared")
    config.validation_fraction = 0.3
    return config


@pytest.fixture
def prepared(config):
    builder = TinyStoriesForTests(data_dir=config.tfds_data_dir)
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    return builder


def all_texts(corpus):
    return [
        corpus.tokenizer.decode(document["tokens"])
        for source in (corpus.train, corpus.validation)
        for document in source
    ]


def test_dataset_that_is_not_prepared_yet_is_prepared(config, caplog):
    with caplog.at_level(logging.WARNING):
        corpus = prepare(config)
    assert sorted(all_texts(corpus)) == sorted(STORIES)
    skipped = [r.getMessage() for r in caplog.records if "skipped 1" in r.getMessage()]
    assert len(skipped) == 1
    assert "tiny_stories_for_tests/1.0.0/train/" in skipped[0]
    assert corpus.document_name(0).startswith("tiny_stories_for_tests/1.0.0/train/")


def test_by_name_and_by_directory(config, prepared):
    by_name = prepare(config)
    config.tfds = str(prepared.data_dir)
    by_directory = prepare(config)
    assert by_name.directory == by_directory.directory


def test_part_of_a_split_and_max_documents(config, prepared):
    config.tfds_split = "train[:50%]"
    half = prepare(config)
    assert sum(s.num_documents for s in half.splits.values()) in (9, 10, 11)
    config.max_documents = 5
    five = prepare(config)
    assert sum(s.num_documents for s in five.splits.values()) == 5
    assert five.directory != half.directory


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("tfds", "no_such_dataset_anywhere", "Expected a TFDS dataset"),
        ("tfds_split", "test", "expected one of train"),
        ("tfds_text_field", "body", "expected one of text"),
        ("tfds_text_field", "stars", "expected one of text"),
    ],
)
def test_mistakes_name_the_field(config, prepared, field, value, expected):
    config[field] = value
    with pytest.raises(ValueError, match=rf"data\.{field}='{value}'.*{expected}") as error:
        prepare(config)
    assert "\n" not in str(error.value)


def test_format_that_needs_tensorflow(config, prepared):
    path = prepared.data_path / "dataset_info.json"
    info = json.loads(path.read_text())
    info["fileFormat"] = "tfrecord"
    path.write_text(json.dumps(info))
    config.tfds = str(prepared.data_dir)
    with pytest.raises(ValueError, match=r"data\.tfds=.*expected array_record"):
        resolve_source(config)
