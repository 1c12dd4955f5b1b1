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
from hpsafety.train.work import count_tokens, model_flops


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
        self.rates: list[gemm_limit.Rates] = []  # before and after the recorded steps
        self.rows = 0  # of a micro-batch, in them

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
        new = count_tokens(groups) | {"flops": passes * sum(model_flops(model, g) for g in groups)}
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
        if self.counts:  # of the last warm-up step
            self._measure_gemms(self.counts)
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
        return {
            "stage": self.stage, "trace": trace.name, "device": str(_device(self.cfg)),
            "dtype": str(self._dtype()).removeprefix("torch."),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "steps": self.steps_done,
            "warmup_steps": self.settings.profile_warmup, "gemm": self._gemm_limit(),
            "peak_rss_mb": metrics.peak_rss_mb(), "account": account.read(trace),
        }  # fmt: skip

    def _measure_gemms(self, counts: dict) -> None:
        """The rates of the GEMM routes now, all ranks at a time; nothing for a stage that counts no work.

        counts  tokens and trained rows of one step: they set the micro-batch's rows at the first call
        """
        if self.model_config is None:
            return
        tokens = max(1, int(counts["tokens"]))
        self.rows = self.rows or min(getattr(self.cfg, "tokens_per_batch", tokens), tokens)
        shapes = gemm_limit.shapes(self.model_config, tokens, counts["trained"], self.rows)
        self._barrier()
        self.rates.append(gemm_limit.measure(shapes, self._dtype(), str(_device(self.cfg))))

    def _dtype(self) -> torch.dtype:
        return precision.choose(getattr(self.cfg, "precision", "fp32"), _device(self.cfg))[0]

    def _gemm_limit(self) -> dict | None:
        """The limit at the recorded mix of shapes: the best of what was measured before the steps and after them."""
        total = {k: sum(step.get(k, 0) for step in self.steps_done) for k in ("tokens", "trained")}
        self._measure_gemms({k: v / len(self.steps_done) for k, v in total.items()})
        if not self.rates:
            return None
        shapes = gemm_limit.shapes(self.model_config, max(1, total["tokens"]), total["trained"], self.rows)
        rates = gemm_limit.best_of(self.rates)
        best = {name: max(routes, key=routes.get) for name, routes in rates.items()}
        single = [gemm_limit.combine(shapes, one) for one in self.rates]
        return {"gflops": gemm_limit.combine(shapes, rates), "single_gflops": single, "rows": self.rows,
                "rates": rates, "best_route": best}  # fmt: skip


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
