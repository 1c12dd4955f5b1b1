"""What a run tells: metrics.jsonl, log.txt, TensorBoard events and a progress bar; all on rank 0 only."""

import json
import logging
import os
import resource
import sys
import time
from pathlib import Path

log = logging.getLogger("hpsafety")


def peak_rss_mb() -> float:
    """Peak resident memory of this process, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def open_log(path: Path) -> logging.Handler:
    """Sends the package's log to `path` too (appending), until close_log is given the handler."""
    log.setLevel(logging.INFO)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    return handler


def close_log(handler: logging.Handler | None) -> None:
    """Ends one log file; None is none."""
    if handler is not None:
        log.removeHandler(handler)
        handler.close()


def say(line: str) -> None:
    """One line for the user: on stderr and in the log."""
    log.info(line)
    print(line, file=sys.stderr, flush=True)


def read_metrics(folder: Path) -> list[dict]:
    """A run's lines of metrics.jsonl, in order."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class Metrics:
    """Appends one JSON object per step and mirrors numbers to TensorBoard.

    On opening, lines beyond `resume_step` are cut: they belong to steps that will be made again.
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        self.path = folder / "metrics.jsonl"
        kept = []
        if self.path.exists() and resume_step:
            rows = self.path.read_text(encoding="utf-8").splitlines()
            kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= resume_step]
        self.path.write_text("".join(row + "\n" for row in kept), encoding="utf-8")
        self.handle = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder / "tb"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, record: dict) -> None:
        """record  must hold "step"; floats that are not finite are written as null (strict JSON)."""
        clean = {
            k: v if not isinstance(v, float) or abs(v) < float("inf") else None for k, v in record.items()
        }
        self.handle.write(json.dumps(clean, allow_nan=False) + "\n")
        self.handle.flush()
        for name, value in clean.items():
            if name != "step" and isinstance(value, int | float):
                self.board.add_scalar(name, value, clean["step"])

    def close(self) -> None:
        os.fsync(self.handle.fileno())
        self.handle.close()
        self.board.close()


class Progress:
    """A bar with rate and time left on a terminal; a line every `every_s` seconds where there is none."""

    def __init__(self, title: str, total: int, done: int = 0, every_s: float = 10.0):
        self.title, self.total, self.every_s = title, total, every_s
        self.first, self.started, self.last = done, time.monotonic(), 0.0
        self.bar = self.task = None
        if sys.stderr.isatty():
            self._open_bar(done)

    def _open_bar(self, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            "[bold]{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=self.total, completed=done, note="")

    def update(self, done: int, note: str) -> None:
        """done  steps finished; note  short text with rate and loss."""
        log.info("%s %d/%d %s", self.title, done, self.total, note)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self.last >= self.every_s or done == self.total:
            self.last = now
            rate = (now - self.started) / max(1, done - self.first)
            left = int(rate * (self.total - done))
            print(
                f"{self.title} {done}/{self.total}  {note}  left {left // 60}:{left % 60:02d}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
