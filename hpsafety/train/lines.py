"""JSON lines in, JSON lines out, one line per input line and in its order: resumable, over ranks, larger than memory.

While it runs, OUT.part/ holds what is finished, in any order: rank-N.jsonl of {"index": line, "row": ...}, and
manifest.json. At the end rank 0 copies the rows in order to OUT, writes OUT.manifest.json and removes OUT.part/. The
same command after an interruption goes on with what is missing, with any number of ranks.
"""

import dataclasses
import itertools
import json
import logging
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hpsafety.data.records import iter_numbered, iter_records
from hpsafety.errors import InputError, file_error
from hpsafety.files import atomic_write
from hpsafety.train import distributed
from hpsafety.train.metrics import close_log, open_log
from hpsafety.train.rundir import input_hashes, now, refuse_other, sha256, versions

log = logging.getLogger("hpsafety")


class LineJob:
    """One command that turns the rows of `data` into as many rows of `out`.

    data    JSON-lines files of records of `kind`, one after another; rows that the reader excludes count as no line
    config  the command's dataclass: its fields, but those of how it is run, must be the same to go on
    extra   more inputs by name -> sha256 (models), which must be the same too
    Raises InputError for bad rows (all files are read once before any work), and when OUT.part is another command's.
    """

    def __init__(self, command: str, config, data, kind: str, extra: dict[str, str], world):
        self.data, self.kind, self.world = [Path(p) for p in data], kind, world
        self.out = Path(config.out)
        self.part = self.out.with_name(self.out.name + ".part")
        if self.out.is_dir():
            raise file_error(self.out, "--out must be a file, but a directory stands there; choose another")
        self.counts: Counter = Counter()
        self.total = sum(1 for path in self.data for _ in iter_records(path, kind, self.counts))
        if self.total == 0:
            raise InputError(f"{', '.join(map(str, self.data))}: no rows are left to work on")
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
        hashes = input_hashes(self.data) | extra
        self.manifest = {
            "stage": command, "config": settings, "code_version": versions()["hpsafety"], "seed": settings.get("seed"),
            "versions": versions(), "world_size": world.size, "input_hashes": hashes, "output_hashes": {},
            "counts": {}, "started": now(), "ended": None,
        }  # fmt: skip
        self.complete = self._finished_before(config.resume)
        if config.resume:
            self._refuse_other()
        self.done: set[int] = set()  # lines that have a result from before
        self.handle = self.log = None

    def _finished_before(self, resume: bool) -> bool:
        """Whether OUT is already the result of this very command."""
        path = self.manifest_path
        if not (resume and self.out.is_file() and path.is_file()):
            return False
        old = json.loads(path.read_text(encoding="utf-8"))
        return old.get("output_hashes", {}).get(self.out.name) == sha256(self.out) and not refuse_other(
            self.manifest, old
        )

    @property
    def manifest_path(self) -> Path:
        return self.out.with_name(self.out.name + ".manifest.json")

    def open(self, resume: bool) -> None:
        """Makes OUT.part, or takes up what it holds (resume)."""
        if self.world.is_main:
            self._claim(resume)
        distributed.barrier(self.world)
        for path in sorted(self.part.glob("rank-*.jsonl")):
            self.done.update(json.loads(line)["index"] for line, _ in _whole_lines(path))
        distributed.barrier(self.world)  # nobody appends before everybody has read
        path = self.part / f"rank-{self.world.rank}.jsonl"
        _cut_half_line(path)
        self.handle = open(path, "ab")  # noqa: SIM115  closed by close()
        if self.world.is_main:
            self.log = open_log(self.part / "log.txt")
            if self.done:
                log.info("resumed: %d of %d lines are done", len(self.done), self.total)

    def _refuse_other(self) -> None:
        path = self.part / "manifest.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        why = None if old is None else refuse_other(self.manifest, old)
        if why:
            raise file_error(
                self.part, f"holds an unfinished run of another {why}; choose another --out, or --no-resume"
            )

    def _claim(self, resume: bool) -> None:
        path = self.part / "manifest.json"
        if self.part.exists() and not resume:
            shutil.rmtree(self.part)
        if path.is_file():
            return
        self.part.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as handle:
            json.dump(self.manifest, handle, indent=2)

    def check_rows(self, check: Callable[[dict], None]) -> None:
        """Calls check(row) for every row; an InputError it raises gets the row's FILE:LINE (before any work)."""
        for path in self.data:
            for line, row in iter_numbered(path, self.kind):
                try:
                    check(row)
                except InputError as error:
                    raise file_error(path, str(error), line) from None

    def place(self, index: int) -> str:
        """FILE:LINE of a row, for a message: reads the files again up to there."""
        places = (f"{path}:{line}" for path in self.data for line, _ in iter_numbered(path, self.kind))
        return next(itertools.islice(places, index, None))

    def rows(self) -> Iterator[tuple[int, dict]]:
        """(line, row) of what this rank still has to do; the remaining lines go round the ranks."""
        index = turn = 0
        for path in self.data:
            for row in iter_records(path, self.kind):
                if index not in self.done:
                    if turn % self.world.size == self.world.rank:
                        yield index, row
                    turn += 1
                index += 1

    def add(self, index: int, row: dict) -> None:
        """Keeps the result of one line; it survives a kill from here on."""
        text = json.dumps(
            {"index": index, "row": row}, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
        self.handle.write(text.encode() + b"\n")
        self.handle.flush()

    def close(self) -> None:
        """Ends the files of this process; after an interruption OUT.part stays as it is."""
        if self.handle is not None:
            self.handle.close()
        close_log(self.log)
        self.log = None

    @contextmanager
    def working(self, resume: bool) -> Iterator[None]:
        """Open within and closed after; an interruption says where the finished lines are."""
        self.open(resume)
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; what is finished is kept in {self.part}: run the same command again to go on"
            ) from None
        finally:
            self.close()

    def finish(self, counts: dict) -> None:
        """Writes OUT from the parts of all ranks, its manifest beside it, and removes OUT.part (a collective call)."""
        self.close()
        distributed.barrier(self.world)
        if self.world.is_main:
            written = self._merge()
            self.manifest |= {
                "output_hashes": {self.out.name: sha256(self.out)},
                "counts": {"lines": written} | counts,
                "ended": now(),
            }
            with atomic_write(self.manifest_path) as handle:
                json.dump(self.manifest, handle, indent=2)
            shutil.rmtree(self.part)
        distributed.barrier(self.world)

    def _merge(self) -> int:
        """Copies the rows in order; holds 16 bytes a line in memory, never the rows."""
        paths = sorted(self.part.glob("rank-*.jsonl"))
        files, offsets = array("i", [-1]) * self.total, array("q", [0]) * self.total
        for number, path in enumerate(paths):
            for line, offset in _whole_lines(path):
                index = json.loads(line)["index"]
                files[index], offsets[index] = number, offset
        missing = [i for i in range(self.total) if files[i] < 0]
        if missing:
            raise RuntimeError(f"{len(missing)} lines have no result, the first is {missing[0]}")
        handles = [open(path, "rb") for path in paths]  # noqa: SIM115
        try:
            with atomic_write(self.out, "wb") as target:
                for number, offset in zip(files, offsets, strict=True):
                    handles[number].seek(offset)
                    row = json.loads(handles[number].readline())["row"]
                    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
                    target.write(text.encode() + b"\n")
        finally:
            for handle in handles:
                handle.close()
        return self.total


def _whole_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """(line, its offset) of every line that was written to its end."""
    offset = 0
    with open(path, "rb") as handle:
        for line in handle:
            if line.endswith(b"\n"):
                yield line, offset
            offset += len(line)


def _cut_half_line(path: Path) -> None:
    """Takes off what a kill left of a last line."""
    if not path.exists():
        return
    end = 0
    for line, offset in _whole_lines(path):
        end = offset + len(line)
    with open(path, "rb+") as handle:
        handle.truncate(end)
