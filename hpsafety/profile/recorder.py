"""Hears a stage's steps (hpsafety/train/phases.py), records some under torch.profiler and makes the report."""

import contextlib
import os
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from hpsafety.profile import account, report
from hpsafety.train import gemm_limit, metrics, precision
from hpsafety.train.phases import Enough
from hpsafety.train.work import count_tokens, forward_flops


class Recorder:
    """What hpsafety.train.phases wants of a recorder; entered as a context, it puts the profiler away in any case.

    text  the report, once Enough was raised; seen: steps that ended
    """

    def __init__(self, stage: str, cfg, settings, out: Path):
        self.stage, self.cfg, self.settings, self.out = stage, cfg, settings, out
        self.seen, self.text = 0, ""
        self.recording, self.profiler, self.model_config = False, None, None
        self.steps_done: list[dict] = []  # one of the recorded steps each
        self.counts: dict[str, float] = {}  # of the step that runs

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self.recording:  # left by an error: nothing is written
            self.recording = False
            with contextlib.suppress(Exception):
                self.profiler.stop()

    # what phases calls

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        nvtx = torch.cuda.is_available()
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            with torch.profiler.record_function(account.PHASE + name):
                yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()

    def work(self, model, groups: list, passes: int) -> None:
        self.model_config = model.config
        new = count_tokens(groups) | {"flops": passes * sum(forward_flops(model.config, g) for g in groups)}
        self.counts = {name: self.counts.get(name, 0) + value for name, value in new.items()}

    def steps(self, items: Iterable) -> Iterator:
        warm, wanted = self.settings.profile_warmup, self.settings.profile_steps
        for number, item in enumerate(items):
            if number == warm:
                self._start()
            self.counts = {}
            before = _usage()
            with torch.profiler.record_function(account.STEP):
                yield item
            self._synchronize()
            self.seen += 1
            if self.recording:
                spent = {name: value - before[name] for name, value in _usage().items()}
                self.steps_done.append(spent | self.counts)
            if number + 1 == warm + wanted:
                self._finish()
                raise Enough

    # the recording

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._barrier()
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self.recording = True
        self.profiler.start()

    def _synchronize(self) -> None:
        if self.recording and torch.cuda.is_available():
            torch.cuda.synchronize()

    def _barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def _finish(self) -> None:
        self.recording = False
        self.profiler.stop()
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        trace = self.out / ("trace.json.gz" if ranks == 1 else f"trace_rank{rank}.json.gz")
        self.profiler.export_chrome_trace(str(trace))
        self.profiler = None
        mine = self._summary(trace) | {"rank": rank}
        everyone = [mine]
        if ranks > 1:
            everyone = [None] * ranks
            dist.all_gather_object(everyone, mine)
        if rank == 0:
            self.text = report.write(self.out, self.stage, everyone)

    def _summary(self, trace: Path) -> dict:
        device = _device(self.cfg)
        dtype = precision.choose(getattr(self.cfg, "precision", "fp32"), device)[0]
        return {
            "stage": self.stage, "trace": trace.name, "device": str(device), "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "steps": self.steps_done,
            "warmup_steps": self.settings.profile_warmup, "gemm": self._gemm_limit(dtype, device),
            "peak_rss_mb": metrics.peak_rss_mb(), "account": account.read(trace),
        }  # fmt: skip

    def _gemm_limit(self, dtype: torch.dtype, device: torch.device) -> dict | None:
        """The limit at the recorded mix of shapes, all ranks at a time; None for a stage that counts no work."""
        total = {k: sum(step.get(k, 0) for step in self.steps_done) for k in ("tokens", "trained")}
        if self.model_config is None:
            return None
        per_step = max(1, total["tokens"] // len(self.steps_done))
        rows = min(getattr(self.cfg, "tokens_per_batch", per_step), per_step)
        shapes = gemm_limit.shapes(self.model_config, max(1, total["tokens"]), total["trained"], rows)
        self._barrier()
        rates = gemm_limit.measure(shapes, dtype, str(device))
        best = {s.name: max(rates[s.name], key=rates[s.name].get) for s in shapes}
        return {"gflops": gemm_limit.combine(shapes, rates), "rows": rows, "rates": rates, "best_route": best}


def _device(cfg) -> torch.device:
    """The device a stage takes; distributed.init resolves "auto" alike."""
    name = getattr(cfg, "device", "auto")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def _usage() -> dict[str, float]:
    """Clocks and counters of this process: seconds, and page faults served without I/O."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter(), "main_thread_s": time.thread_time(), "user_s": used.ru_utime,
        "system_s": used.ru_stime, "page_faults": used.ru_minflt,
    }  # fmt: skip
