"""Readers of corpora. The bug this file must catch: a document that is lost or read twice at the border of two blocks,
or where a job goes on."""

import gzip
import json
import random

import pytest

from hpsafety.data import corpus
from hpsafety.data.corpus import Fault, Place, corpus_files, documents, read_blocks
from hpsafety.errors import InputError

MAX_LINE, START = 5000, Place()


def texts(count: int) -> list[str]:
    """Documents of 1 to 400 characters, some with line ends, quotes and letters of several bytes."""
    rng = random.Random(0)
    return [
        f"document {i} " + rng.randbytes(i * 5 % 53).hex() + ' wörd 中 "q"\n' * (i * 7 % 31) + "end"
        for i in range(count)
    ]


def write_json(path, rows, opener=open) -> None:
    with opener(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)


def write_zstd(path, rows) -> None:
    """A frame for every ten documents."""
    import zstandard

    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in rows]
    path.write_bytes(
        b"".join(zstandard.compress(b"".join(lines[i : i + 10])) for i in range(0, len(lines), 10))
    )


def write_parquet(path, rows, groups: int = 100, **columns) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(rows))), "text": rows} | columns)
    pyarrow.parquet.write_table(table, path, row_group_size=groups)


def read(files, start=START, max_line: int = MAX_LINE) -> list[tuple[int, int, str | Fault]]:
    """(file, line, text or fault) of everything behind `start`."""
    return [
        (block.file, line, text)
        for block in read_blocks(list(files), start, max_line)
        for line, text in documents(block, max_line)
    ]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 300 bytes and 7 rows, so that borders fall everywhere."""
    monkeypatch.setattr(corpus, "BLOCK", 300)
    monkeypatch.setattr(corpus, "ROWS", 7)


WRITERS = {
    "a.jsonl": write_json,
    "a.json.gz": lambda path, rows: write_json(path, rows, gzip.open),
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "a.txt": lambda path, rows: path.write_text(
        "\n\n".join(row.replace("\n", " ") for row in rows), encoding="utf-8"
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_every_document_once(tmp_path, small_blocks, name):
    rows = texts(150)
    WRITERS[name](tmp_path / name, rows)
    found = read(corpus_files([str(tmp_path / name)]))
    plain = [row.replace("\n", " ") for row in rows] if name == "a.txt" else rows
    assert [text for _, _, text in found] == plain
    step = 2 if name == "a.txt" else 1  # blank lines are no documents, and count as lines
    assert [line for _, line, _ in found] == [1 + step * i for i in range(150)]


@pytest.mark.parametrize("name", WRITERS)
def test_reading_goes_on_at_any_place(tmp_path, small_blocks, name):
    """Whatever block is the last one that was kept, the rest follows, nothing twice; block borders may differ."""
    for file in ("1", "2"):
        WRITERS[name](tmp_path / f"{file}{name}", texts(60))
    files = corpus_files([str(tmp_path)])
    whole, blocks = read(files), list(read_blocks(files, Place(), MAX_LINE))
    assert len(files) == 2 and len(blocks) > 10 and len(whole) == 120
    done = 0
    for block in blocks:
        done += len(list(documents(block, MAX_LINE)))
        assert read(files, block.end) == whole[done:]


def test_giant_lines_are_passed_over_without_being_held(tmp_path, small_blocks):
    """A line longer than a block and one longer than --max-line: the first is read, the second counted in its place."""
    rows = ["one", "x" * 4000, "y" * 9000, "two", "z" * 9000]
    write_json(tmp_path / "a.jsonl", rows)
    found = read(corpus_files([str(tmp_path / "a.jsonl")]))
    assert [(line, t.kind if isinstance(t, Fault) else t) for _, line, t in found] == [
        (1, "one"), (2, "x" * 4000), (3, "giant line"), (4, "two"), (5, "giant line"),
    ]  # fmt: skip
    assert f"{tmp_path / 'a.jsonl'}:3: a line of more than 5,000 bytes" in found[2][2].message
    largest = max(sum(map(len, b.raw)) for b in read_blocks([tmp_path / "a.jsonl"], Place(), MAX_LINE))
    assert largest < MAX_LINE
    blocks = list(read_blocks([tmp_path / "a.jsonl"], Place(), MAX_LINE))
    assert read([tmp_path / "a.jsonl"], blocks[-2].end) == found[4:]


def test_a_line_of_exactly_the_most_is_read(tmp_path):
    line = json.dumps({"text": "x" * 100}).encode()
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    assert isinstance(read([tmp_path / "a.jsonl"], max_line=len(line))[0][2], str)
    assert read([tmp_path / "a.jsonl"], max_line=len(line) - 1)[0][2].kind == "giant line"


def test_broken_lines_are_faults_in_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "good"}\n{"text": "\xff"}\n\n[1]\n{"body": "x"}\n{"text": 3}\n{"text": " \\n "}\n'
        b'{"text": "\\ud800"}\n{"text": "half\n{"text": "last"}'
    )
    found = [(line, t.kind if isinstance(t, Fault) else t) for _, line, t in read([path])]
    assert found == [
        (1, "good"), (2, "broken encoding"), (4, "broken record"), (5, "broken record"), (6, "broken record"),
        (7, "empty document"), (8, "broken record"), (9, "broken record"), (10, "last"),
    ]  # fmt: skip
    messages = {line: t.message for _, line, t in read([path]) if isinstance(t, Fault)}
    assert messages[2] == f"{path}:2: not UTF-8: byte 0xff at byte 11"
    assert messages[5] == f'{path}:5: field "text" is missing; a document needs text'


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_packed_file_that_ends_too_soon(tmp_path, small_blocks, ending):
    """What stands before the break is read, the half line at the break is not, and the next file follows."""
    rows = texts(2000)
    path = tmp_path / f"a.jsonl{ending}"
    write_json(path, rows, gzip.open) if ending == ".gz" else write_zstd(path, rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    write_json(tmp_path / "b.jsonl", ["next"])
    *found, fault, follows = read(corpus_files([str(tmp_path)]))
    assert 20 < len(found) < 1900 and [text for _, _, text in found] == rows[: len(found)]
    assert fault[2].kind == "broken file" and fault[2].message.startswith(
        f"{path}: broken after line {len(found)}: "
    )
    assert follows == (1, 1, "next")


def test_damaged_files(tmp_path):
    """A flipped byte inside, a file that is not packed at all, a parquet file cut short, and one without the column."""
    import pyarrow
    import pyarrow.parquet

    write_json(tmp_path / "a.jsonl.gz", texts(500), gzip.open)
    data = bytearray((tmp_path / "a.jsonl.gz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "c.jsonl.zst").write_bytes(b"plain text")
    write_parquet(tmp_path / "d.parquet", texts(50))
    (tmp_path / "d.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-100])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "e.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "f.parquet")
    faults = [t for _, _, t in read(corpus_files([str(tmp_path)])) if isinstance(t, Fault)]
    files = [t.message.split(":")[0].rsplit("/", 1)[1] for t in faults if t.kind == "broken file"]
    assert files == ["a.jsonl.gz", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.parquet", "f.parquet"]
    assert (
        'no column "text"; it has body' in faults[-2].message
        and "holds int64, not text" in faults[-1].message
    )


def test_parquet_values(tmp_path):
    """Nulls and broken UTF-8 are faults of their row alone; a dictionary column is text too."""
    import pyarrow
    import pyarrow.parquet

    values = pyarrow.array([b"good", None, b"\xff", b" ", b"x" * 6000], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    found = [(line, t.kind if isinstance(t, Fault) else t) for _, line, t in read([tmp_path / "a.parquet"])]
    kinds = ["broken record", "broken encoding", "empty document", "giant line"]
    assert found == [(1, "good"), *enumerate(kinds, start=2)]
    words = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), tmp_path / "b.parquet")
    assert [t for _, _, t in read([tmp_path / "b.parquet"])] == ["a", "b", "a"]


def test_many_gzip_members_and_zstd_frames(tmp_path):
    """Packed files that were put together with cat."""
    import zstandard

    lines = [json.dumps({"text": f"t{i}"}).encode() + b"\n" for i in range(50)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        assert [t for _, _, t in read([tmp_path / name])] == [f"t{i}" for i in range(50)]


def test_a_zstd_bomb_is_given_in_pieces(tmp_path):
    """400 MB of one line out of a few kilobytes: a fault, and never held."""
    import tracemalloc

    import zstandard

    with zstandard.open(tmp_path / "a.txt.zst", "wb") as handle:
        for _ in range(400):
            handle.write(b"x" * 10**6)
    assert (tmp_path / "a.txt.zst").stat().st_size < 100_000
    tracemalloc.start()
    found = read([tmp_path / "a.txt.zst"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [t.kind for _, _, t in found] == ["giant line"] and peak < 150 * 2**20


def test_which_files(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.txt", "c.md"):
        (tmp_path / name).write_text("x\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.json.gz").write_bytes(b"")
    assert [p.name for p in corpus_files([str(tmp_path)])] == ["a.txt", "b.jsonl", "d.json.gz"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "e.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for path, message in (
        ("c.md", "a corpus file ends in .jsonl"),
        ("absent.jsonl", "no such file"),
        ("empty", "the folder holds no file"),
        ("e.parquet", r'reading it needs pyarrow: pip install "hpsafety\[audit\]"'),
    ):
        with pytest.raises(InputError, match=message):
            corpus_files([str(tmp_path / path)])
