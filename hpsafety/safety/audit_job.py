"""The two passes of an audit over a corpus: all documents are counted, then a sample of the English ones is scored.

Two passes, because which documents are the sample follows from how many there are. What is done is kept in
OUT/state.json every few seconds, with the length of the file that grows beside it (faults.jsonl, then sample.jsonl): an
audit that was killed cuts that file back and goes on at that place, to the same bytes.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpsafety.data.corpus import Block, Place, read_blocks
from hpsafety.errors import InputError, RunError
from hpsafety.files import atomic_write
from hpsafety.safety.audit import Counts, measure_block, read_counts, score_block
from hpsafety.safety.audit_pool import in_order, processes
from hpsafety.safety.audit_sample import Sample, choose_sample
from hpsafety.train.loop import stop_signals
from hpsafety.train.metrics import Progress

STATE, FAULTS, SAMPLE = "state.json", "faults.jsonl", "sample.jsonl"
EXAMPLES = 5  # faults of each kind that audit.json names; faults.jsonl names all
SAVE_S, SHOW_S = 10.0, 2.0  # seconds


@dataclass
class State:
    """How far an audit has come."""

    scoring: bool = False  # the second pass
    place: Place = field(default_factory=Place)
    length: int = 0  # bytes of the file the pass appends to
    counts: Counts = field(default_factory=Counts)
    examples: dict[str, list[str]] = field(default_factory=dict)  # kind -> the first messages

    @property
    def fresh(self) -> bool:
        return not self.scoring and self.place == Place()


def load_state(folder: Path) -> State | None:
    """What an earlier run of this audit left; None where there is nothing."""
    path = folder / STATE
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return State(**record | {"place": Place(**record["place"]), "counts": read_counts(record["counts"])})


def save_state(state: State, folder: Path) -> None:
    with atomic_write(folder / STATE) as handle:
        json.dump(vars(state) | {"place": asdict(state.place), "counts": state.counts.record()}, handle)


class Audit:
    """One audit at work. cfg: AuditConfig; files: those of the corpus; folder: OUT, which exists."""

    def __init__(self, cfg, files: list[Path], folder: Path, workers: int, state: State):
        self.cfg, self.files, self.folder, self.workers, self.state = cfg, files, folder, workers, state
        self.sizes = [path.stat().st_size for path in files]
        self.stamps = [path.stat().st_mtime_ns for path in files]

    def run(self) -> Sample:
        """Both passes, from where the state stands. Raises InputError for the first fault without --keep-going."""
        if self.state.counts.faults and not self.cfg.keep_going:
            raise InputError(_fatal(next(iter(self.state.examples.values()))[0]))
        with processes(self.workers) as self.pool:
            return self._passes()

    def _passes(self) -> Sample:
        if not self.state.scoring:
            self._count()
            self.state.scoring, self.state.place, self.state.length = True, Place(), 0
            save_state(self.state, self.folder)
        sample = choose_sample(self.state.counts.buckets, self.cfg.toxicity_sample)
        if sample.size:
            self._score(sample)
        if [(p.stat().st_size, p.stat().st_mtime_ns) for p in self.files] != list(
            zip(self.sizes, self.stamps, strict=True)
        ):
            raise RunError(
                "a file of the corpus was changed while it was read; --no-resume starts the audit anew"
            )
        return sample

    def _count(self) -> None:
        work = functools.partial(measure_block, seed=self.cfg.seed, max_line=self.cfg.max_line_bytes)

        def keep(block: Block, result) -> list[dict]:
            counts, faults = result
            if faults and not self.cfg.keep_going:
                raise InputError(_fatal(faults[0].message))
            for fault in faults:
                named = self.state.examples.setdefault(fault.kind, [])
                if len(named) < EXAMPLES:
                    named.append(fault.message)
            self.state.counts.add(counts)
            return [asdict(fault) for fault in faults]

        self._pass("counting", FAULTS, work, keep)

    def _score(self, sample: Sample) -> None:
        work = functools.partial(
            score_block, seed=self.cfg.seed, max_line=self.cfg.max_line_bytes, sample=sample,
            classifier=self.cfg.classifier, toxic_label=self.cfg.toxic_label,
        )  # fmt: skip
        self._pass("scoring", SAMPLE, work, lambda block, rows: rows)

    def _pass(
        self, title: str, name: str, work: Callable, keep: Callable[[Block, object], Iterable[dict]]
    ) -> None:
        """Every block from the state's place on through `work`; `keep` makes its result the rows to append."""
        total, state = sum(self.sizes), self.state
        before = sum(self.sizes[: state.place.file])
        progress = Progress(f"{title}, MB", max(1, total // 10**6), before // 10**6)
        started = saved = shown = time.monotonic()
        first, path = state.counts.bytes, self.folder / name
        blocks = read_blocks(self.files, state.place, self.cfg.max_line_bytes)
        with (
            stop_signals() as caught,
            open(path, "ab") as handle,
            closing(in_order(work, blocks, self.pool, 2 * self.workers)) as results,
        ):
            handle.truncate(state.length)
            try:
                for block, result in results:
                    for row in keep(block, result):
                        handle.write(
                            json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
                        )
                    state.place = block.end
                    now = time.monotonic()
                    if now - shown >= SHOW_S:
                        shown = now
                        read = sum(self.sizes[: block.file]) + block.read
                        rate = (
                            (state.counts.bytes - first) / 1e6 / (now - started)
                            if not state.scoring
                            else None
                        )
                        progress.update(read // 10**6, f"{rate:.1f} MB/s" if rate is not None else "")
                    if now - saved >= SAVE_S:
                        saved = now
                        self._save(handle)
                    if caught:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; what is counted is kept in {self.folder}: run the same command again to go on"
                ) from None
            finally:  # a fault or a stop comes between two blocks, so the state is whole
                if not state.fresh:
                    self._save(handle)
                progress.close()

    def _save(self, handle) -> None:
        handle.flush()
        os.fsync(handle.fileno())
        self.state.length = handle.tell()
        save_state(self.state, self.folder)


def _fatal(message: str) -> str:
    return f"{message}. --keep-going counts and names such input, and goes on"
