"""A corpus larger than memory: blocks of raw documents out of text, JSON lines and parquet, plain, gzip or zstd.

A reader gives blocks in order and never holds more than a block and one line; a worker turns a block into documents.
What is broken becomes a Fault in its place. A Place says where to go on, so that a job can be resumed at any block.
"""

import contextlib
import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpsafety.data.records import decode_utf8, parse_object, unreadable
from hpsafety.data.schemas import bad_row, validate
from hpsafety.errors import InputError, file_error

BLOCK = 1 << 20  # bytes of unpacked text in a block, about
ROWS = 256  # of parquet in a block
FORMS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".txt": "text", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
KINDS = ("broken encoding", "broken record", "giant line", "empty document", "broken file")


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading goes on: file number, bytes (rows of parquet) of its unpacked content and lines before this."""

    file: int = 0
    offset: int = 0
    line: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that cannot be measured. message starts with FILE:LINE: or FILE:"""

    kind: str
    message: str


@dataclass(slots=True)
class Block:
    """Some raw lines or rows of one file, in order, and the faults the reader met behind them."""

    path: str
    file: int
    form: str  # json, text or parquet
    first: int  # number of the first line or row, from 1
    raw: list[bytes | None]
    end: Place
    read: int  # bytes of the file as it lies on disk that have been read
    faults: list[Fault] = field(default_factory=list)


def corpus_files(paths: Iterable[str]) -> list[Path]:
    """The files of a corpus, in order; a folder stands for its files of a known ending, sorted, at any depth.

    Raises InputError for what is not there, for an unknown ending, and for a package that reading would need.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(entry for entry in path.rglob("*") if entry.is_file() and form_of(entry))
            if not inside:
                raise file_error(path, f"the folder holds no file that ends in {_endings()}")
            files += inside
        elif not path.exists():
            raise file_error(path, "no such file")
        elif form_of(path) is None:
            raise file_error(
                path, f"a corpus file ends in {_endings()}; with .gz or .zst behind it where packed"
            )
        else:
            files.append(path)
    for path in files:
        _require_reader(path)
    return files


def form_of(path: Path) -> str | None:
    """json, text or parquet by the file's ending; None where it is none of them."""
    packed = path.suffix in PACKED
    form = FORMS.get(Path(path.stem).suffix if packed else path.suffix)
    return None if packed and form == "parquet" else form


def _endings() -> str:
    return ", ".join(FORMS)


def _require_reader(path: Path) -> None:
    package = {".zst": "zstandard", ".parquet": "pyarrow"}.get(path.suffix)
    if package is None:
        return
    try:
        __import__(package)
    except ImportError:
        raise file_error(path, f'reading it needs {package}: pip install "hpsafety[audit]"') from None


# ---- from files to blocks ----


def read_blocks(files: list[Path], start: Place, max_line: int) -> Iterator[Block]:
    """Blocks of all files from `start` on, in order. Their borders may differ after a resume, their content never.

    max_line  bytes; a longer line is a fault and is never held in memory
    A file that breaks ends with a block that holds the fault; the next file follows.
    """
    for number in range(start.file, len(files)):
        here = start if number == start.file else Place(number)
        yield from _read_file(files[number], here, max_line)


def _read_file(path: Path, start: Place, max_line: int) -> Iterator[Block]:
    form = form_of(path)
    read = _read_rows if form == "parquet" else _read_lines
    try:
        with open(path, "rb") as handle:
            end = start
            try:
                for block in read(path, form, handle, start, max_line):
                    end = block.end
                    yield block
            except _broken() as error:
                after = (
                    f"after {'row' if form == 'parquet' else 'line'} {end.line}"
                    if end.line
                    else "from its start"
                )
                text = " ".join(str(error).split()) or type(error).__name__
                fault = Fault("broken file", f"{path}: broken {after}: {text}; what follows is not read")
                yield Block(
                    str(path),
                    start.file,
                    form,
                    end.line + 1,
                    [],
                    Place(start.file + 1),
                    handle.tell(),
                    [fault],
                )
    except OSError as error:
        raise unreadable(path, error) from None


def _broken() -> tuple[type[Exception], ...]:
    """What readers raise where a file is damaged."""
    errors: list[type[Exception]] = [EOFError, gzip.BadGzipFile, zlib.error, _Damaged]
    with contextlib.suppress(ImportError):
        from zstandard import ZstdError

        errors.append(ZstdError)
    return tuple(errors)


class _Damaged(Exception):
    """A file that is not what its ending says."""


def _read_lines(path: Path, form: str, handle, start: Place, max_line: int) -> Iterator[Block]:
    """Blocks of whole lines. A line longer than max_line is passed over piece by piece."""
    offset, line, held, size, giant = start.offset, start.line, [], 0, False

    def block(raw: list[bytes], faults=()) -> Block:
        place = Place(start.file, offset, line)
        return Block(
            str(path), start.file, form, line - len(raw) + 1, raw, place, handle.tell(), list(faults)
        )

    def too_long() -> Fault:
        return Fault("giant line", f"{path}:{line}: a line of more than {max_line:,} bytes (--max-line)")

    for piece in _at_least(BLOCK, _skip(_pieces(path, handle, start.offset), start.offset, path)):
        if giant:  # everything up to the next line end belongs to it
            cut = piece.find(b"\n") + 1
            offset += cut or len(piece)
            if not cut:
                continue
            piece, giant, line = piece[cut:], False, line + 1
            yield block([], [too_long()])
        cut = piece.rfind(b"\n") + 1
        if cut:
            raw = b"".join([*held, piece[: cut - 1]]).split(b"\n")
            offset, line = offset + size + cut, line + len(raw)
            held, size = [], 0
            yield block(raw)
        rest = piece[cut:]
        held.append(rest)
        size += len(rest)
        if size > max_line:
            offset, held, size, giant = offset + size, [], 0, True
    line += bool(size or giant)
    offset += size
    if giant:
        yield block([], [too_long()])
    elif size:
        yield block([b"".join(held)])


def _pieces(path: Path, handle, offset: int) -> Iterator[bytes]:
    """The unpacked content in pieces of bounded size; a plain file from `offset` on, a packed one from its start."""
    if path.suffix == ".gz":
        with gzip.GzipFile(fileobj=handle) as unpacked:
            while piece := unpacked.read1(
                min(BLOCK, 1 << 16)
            ):  # what was unpacked before a break is not lost
                yield piece
    elif path.suffix == ".zst":
        yield from _unpack_zstd(handle)
    else:
        handle.seek(offset)
        while piece := handle.read(BLOCK):
            yield piece


def _unpack_zstd(handle) -> Iterator[bytes]:
    """All frames of a file. Fed in small pieces: a frame may unpack to thousands of times its size."""
    import zstandard

    def frame():
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    reader, begun = frame(), False
    while packed := handle.read(256):
        while packed:
            if reader.eof:
                reader, begun = frame(), False
            piece, begun = reader.decompress(packed), True
            if piece:
                yield piece
            packed = reader.unused_data if reader.eof else b""
    if begun and not reader.eof:
        raise EOFError("the zstd frame ended before its end was reached")


def _skip(pieces: Iterator[bytes], offset: int, path: Path) -> Iterator[bytes]:
    """The content behind `offset`; a plain file stands there already."""
    left = offset if path.suffix in PACKED else 0
    for piece in pieces:
        if left >= len(piece):
            left -= len(piece)
            continue
        yield piece[left:]
        left = 0


def _at_least(size: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces joined to `size` bytes or more; what stands before a break is given before the break is raised."""
    joined, length = [], 0
    try:
        for piece in pieces:
            joined.append(piece)
            length += len(piece)
            if length >= size:
                yield b"".join(joined)
                joined, length = [], 0
    except _broken():
        if joined:
            yield b"".join(joined)
        raise
    if joined:
        yield b"".join(joined)


def _read_rows(path: Path, form: str, handle, start: Place, max_line: int) -> Iterator[Block]:
    """Blocks of the column `text` as bytes, None where it is null; a row group before `start` is not touched."""
    import pyarrow
    import pyarrow.parquet

    row, whole = 0, path.stat().st_size
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise _Damaged(f'no column "text"; it has {", ".join(file.schema_arrow.names)[:200]}')
        total = max(1, file.metadata.num_rows)
        for group in range(file.num_row_groups):
            ahead = file.metadata.row_group(group).num_rows
            if row + ahead <= start.offset:
                row += ahead
                continue
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=["text"]):
                raw = _as_bytes(batch.column(0))[max(0, start.offset - row) :]
                row += batch.num_rows
                if raw:
                    place = Place(start.file, row, row)
                    yield Block(
                        str(path), start.file, form, row - len(raw) + 1, raw, place, whole * row // total
                    )
    except (pyarrow.ArrowException, OSError) as error:
        raise _Damaged(str(error)) from None


def _as_bytes(column) -> list[bytes | None]:
    """A column of text as its bytes, so that one broken value spoils no other."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = pyarrow.types
    if not (
        kinds.is_string(column.type) or kinds.is_large_string(column.type) or kinds.is_binary(column.type)
    ):
        raise _Damaged(f'column "text" holds {column.type}, not text')
    return column.cast(pyarrow.large_binary()).to_pylist()


# ---- from blocks to documents ----


def documents(block: Block, max_line: int) -> Iterator[tuple[int, str | Fault]]:
    """(line number, text) of every document of a block, or (line number, Fault); blank lines are no documents."""
    for line, raw in enumerate(block.raw, start=block.first):
        if block.form == "parquet" or raw.strip():
            yield line, read_document(block, line, raw, max_line)
    for fault in block.faults:
        yield block.end.line, fault


def read_document(block: Block, line: int, raw: bytes | None, max_line: int) -> str | Fault:
    """The text of one line or row; a Fault where there is none to measure."""
    where = (block.path, f"row {line}" if block.form == "parquet" else line)
    kind = KINDS[0]
    try:
        if raw is None:
            kind = KINDS[1]
            raise bad_row(where, 'field "text" is null; a document needs text')
        if len(raw) > max_line:
            return Fault(
                KINDS[2], f"{where[0]}:{where[1]}: a line of more than {max_line:,} bytes (--max-line)"
            )
        text = decode_utf8(raw, where)
        kind = KINDS[1]
        if block.form == "json":
            text = validate(parse_object(text, where), "document", where)["text"]
    except InputError as error:
        return Fault(kind, str(error))
    if not text.strip():
        return Fault(KINDS[3], f'{where[0]}:{where[1]}: field "text" is empty: no line of it holds a word')
    return text
