"""Where documents come from: the standard library, local files, or a TFDS dataset."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import ml_collections
import numpy as np
from absl import logging

_MAX_NAMED = 50  # skipped documents spelled out in the warning


class Source(Protocol):
    """Readable, non-empty documents in a fixed order.

    Attributes:
      label: kind of source; the prepared directory's name begins with it.
      description: what the user asked for, to begin error messages with.
    """

    label: str
    description: str

    def fingerprint(self) -> str:
        """Returns a string that changes whenever the names or contents of the documents do."""

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """Yields (name, UTF-8 content), the same sequence each time."""


def resolve_source(config: ml_collections.ConfigDict) -> Source:
    """Returns the source that `config.data` names.

    Args:
      config: the data section, validated.

    Raises:
      ValueError: it does not exist or holds no readable text; the message names the field.
    """
    if config.tfds:
        return TfdsSource(config)
    if config.glob:
        return _glob_source(config)
    return _stdlib_source(config)


class FileSource:
    """Text files, one document each.

    Every file is read once here, for its hash; `documents` reads again and insists on the same
    content, so that a prepared directory always holds what its name says.

    Args:
      label: see `Source`.
      description: see `Source`.
      root: directory that the documents' names are relative to.
      paths: the files.
      max_documents: use only the first ones in name order; 0 = all.
      skip_level: absl logging level of the message that names the files skipped.

    Raises:
      ValueError: none of the files is readable, non-empty UTF-8 text.
    """

    def __init__(
        self,
        *,
        label: str,
        description: str,
        root: Path,
        paths: Sequence[Path],
        max_documents: int,
        skip_level: int = logging.WARNING,
    ):
        self.label = label
        self.description = description
        self._files: list[tuple[str, Path, bytes]] = []
        skipped = []
        for name, path in sorted((_name(path.relative_to(root)), path) for path in paths):
            if max_documents and len(self._files) == max_documents:
                break
            if path.exists() and not path.is_file():
                skipped.append(f"{path} (not a regular file)")  # reading a pipe could block
                continue
            try:
                content = path.read_bytes()
            except OSError as error:
                skipped.append(f"{path} ({error.strerror})")
                continue
            problem = _text_problem(content)
            if problem:
                skipped.append(f"{path} ({problem})")
            else:
                self._files.append((name, path, content_digest(content)))
        _report_skipped(description, skipped, skip_level)
        if not self._files:
            raise ValueError(
                f"{description}: none of its {len(paths)} files is usable; "
                "expected non-empty UTF-8 text"
            )

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return json.dumps([(name, digest.hex()) for name, _, digest in self._files])

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """See `Source.documents`.

        Raises:
          RuntimeError: a file changed since it was first read.
        """
        for name, path, digest in self._files:
            content = path.read_bytes()
            if content_digest(content) != digest:
                raise RuntimeError(f"{path} changed while {self.description} was being prepared")
            yield name, content


class TfdsSource:
    """One split of a TensorFlow Datasets dataset, read without TensorFlow.

    Args:
      config: the data section; `tfds`, `tfds_split`, `tfds_text_field`, `tfds_data_dir` and
        `max_documents` are used.

    Raises:
      ValueError: no such dataset, split or text feature, or it cannot be prepared or read without
        TensorFlow.
    """

    label = "tfds"

    def __init__(self, config: ml_collections.ConfigDict):
        self.description = f"data.tfds={config.tfds!r}"
        builder = _tfds_builder(config, self.description)
        splits = builder.info.splits
        try:
            self._instructions = splits[config.tfds_split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"data.tfds_split={config.tfds_split!r} is not a split of {config.tfds!r}; "
                f"expected one of {', '.join(sorted(splits))}"
            ) from error
        features = builder.info.features
        texts = [name for name, feature in features.items() if _is_text(feature)]
        if config.tfds_text_field not in texts:
            raise ValueError(
                f"data.tfds_text_field={config.tfds_text_field!r} is not a text feature of "
                f"{config.tfds!r}; expected one of {', '.join(texts) or '(it has none)'}"
            )
        try:
            self._records = builder.as_data_source(split=config.tfds_split)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.description} is prepared in {builder.info.file_format}; expected "
                "array_record: prepare it with "
                "builder.download_and_prepare(file_format='array_record') in another data_dir"
            ) from error
        self._field = config.tfds_text_field
        self._prefix = f"{builder.info.full_name}/{config.tfds_split}"
        self._limit = config.max_documents or len(self._records)
        self._reported = False

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; goes by the data files' size and time, not their content."""
        files = []
        for instruction in self._instructions:
            stat = os.stat(instruction.filename)
            files.append(
                [
                    Path(instruction.filename).name,
                    instruction.skip,
                    instruction.examples_in_shard,
                    instruction.take,
                    stat.st_size,
                    stat.st_mtime_ns,
                ]
            )
        return json.dumps([self._prefix, self._field, self._limit, files])

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """See `Source.documents`."""
        skipped = []
        count = 0
        for index in range(len(self._records)):
            if count == self._limit:
                break
            content = self._records[index][self._field]
            name = f"{self._prefix}/{index}"
            problem = _text_problem(content)
            if problem:
                skipped.append(f"{name} ({problem})")
                continue
            count += 1
            yield name, content
        if not self._reported:
            _report_skipped(self.description, skipped, logging.WARNING)
            self._reported = True


def content_digest(content: bytes) -> bytes:
    """Returns the 16-byte hash by which documents are compared and split."""
    return hashlib.blake2b(content, digest_size=16).digest()


def _name(path: Path) -> str:
    """A path as text; bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(path.as_posix()).decode(errors="replace")


def _stdlib_source(config: ml_collections.ConfigDict) -> FileSource:
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for directory, subdirectories, files in os.walk(root):
        # Pruned while walking: what is installed there can be a thousand times the library.
        subdirectories[:] = set(subdirectories) - {"site-packages", "dist-packages"}
        paths += [Path(directory, file) for file in files if file.endswith(".py")]
    # The few files that are empty or meant not to be UTF-8 are none of the user's doing.
    return FileSource(
        label="stdlib",
        description=f"the Python standard library in {root}",
        root=root,
        paths=paths,
        max_documents=config.max_documents,
        skip_level=logging.INFO,
    )


def _glob_source(config: ml_collections.ConfigDict) -> FileSource:
    pattern = os.path.abspath(os.path.expanduser(config.glob))
    paths = [Path(path) for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)]
    if not paths:
        raise ValueError(f"data.glob={config.glob!r} matches no file; expected text files")
    root = Path(pattern).parent
    while glob.has_magic(str(root)):
        root = root.parent
    return FileSource(
        label="glob",
        description=f"data.glob={config.glob!r}",
        root=root,
        paths=paths,
        max_documents=config.max_documents,
    )


def _tfds_builder(config: ml_collections.ConfigDict, description: str):
    import tensorflow_datasets as tfds

    path = Path(config.tfds).expanduser()
    if (path / "dataset_info.json").is_file():
        return tfds.builder_from_directory(str(path))
    data_dir = os.path.expanduser(config.tfds_data_dir) if config.tfds_data_dir else None
    try:
        builder = tfds.builder(config.tfds, data_dir=data_dir)
    except Exception as error:  # not found, bad version, bad config: TFDS has a type for each
        raise ValueError(
            f"{description}: {str(error).splitlines()[0]} Expected a TFDS dataset prepared in "
            f"{data_dir or 'the default TFDS directory'}, one that TFDS can download, or the "
            "directory of a prepared one"
        ) from error
    if not builder.is_prepared():
        logging.info("Downloading and preparing %s in %s", builder.info.full_name, builder.data_dir)
        download_config = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            builder.download_and_prepare(
                file_format="array_record", download_config=download_config
            )
        except Exception as error:  # network, disk, checksums, a builder that needs TensorFlow
            raise ValueError(
                f"{description} is not prepared in {builder.data_dir} and preparing it failed: "
                f"{type(error).__name__}: {error}"
            ) from error
    return builder


def _is_text(feature) -> bool:
    import tensorflow_datasets as tfds

    return (
        isinstance(feature, tfds.features.Tensor)
        and feature.shape == ()
        and np.dtype(feature.np_dtype).kind in "OSU"
    )


def _text_problem(content: bytes) -> str | None:
    if not content.strip():
        return "empty"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    return None


def _report_skipped(description: str, skipped: Sequence[str], level: int) -> None:
    if skipped:
        more = len(skipped) - _MAX_NAMED
        named = ", ".join(skipped[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
        logging.log(level, "%s: skipped %d: %s", description, len(skipped), named)
