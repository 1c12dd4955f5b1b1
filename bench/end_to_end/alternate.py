"""One benchmark's runs in turn (A B C A B C), each in a process of its own, and the record of what came out."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.end_to_end.common import Settings, count_tokens, make_groups, needed_flops, write_json
from bench.end_to_end.table import print_table, summarise
from bench.machine import machine

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "bench"
LOSS_TOLERANCE = 1e-3  # on the first step's loss


def parser(work: str, doc: str, contenders: tuple[str, ...], default: list[str]) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    p = argparse.ArgumentParser(prog=f"python -m bench.end_to_end.{work}", description=doc.split("\n")[0])
    model = '"smollm2" or a Hugging Face directory (default: smollm2)'
    p.add_argument("--model", default="smollm2", help=model)
    p.add_argument("--runs", type=int, default=2, help="runs of each contender (default: 2)")
    p.add_argument(
        "--tokens-per-batch", type=int, default=2048, help="tokens per micro-batch (default: 2048)"
    )
    peers = "the peers' budget, to give them their best (default: the same)"
    p.add_argument("--peer-tokens-per-batch", type=int, help=peers)
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)")
    p.add_argument("--threads", type=int, default=2, help="(default: 2)")
    told = f"(default: {' '.join(default)})"
    p.add_argument("--contenders", nargs="+", choices=contenders, default=default, help=told)
    record = "also write machine, versions, settings and all samples to this file"
    p.add_argument("--json", type=Path, help=record)
    return p


def parse(p: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The command line; exits 2 with one line on bad values."""
    options = p.parse_args(arguments)
    if options.peer_tokens_per_batch is None:
        options.peer_tokens_per_batch = options.tokens_per_batch
    for name, value in vars(options).items():
        if type(value) is int and value < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return options


def model_directory(model: str) -> str:
    """A Hugging Face directory all contenders load; the built-in model is written out once."""
    if model != "smollm2":
        return str(Path(model).resolve())
    directory = CACHE / model
    if not (directory / "config.json").is_file():
        from hpsafety import load_model, save_model

        save_model(load_model(model), directory)
    return str(directory)


def reward_directories(model: str, count: int) -> tuple[str, ...]:
    """`count` reward models on the model's weights, heads drawn at random, no two with the same trunk."""
    import torch

    from hpsafety import load_model
    from hpsafety.model.heads import reward_model_from
    from hpsafety.model.reward_io import save_reward_model

    source, paths = model_directory(model), []
    for head in range(count):
        path = CACHE / f"{Path(source).name}-reward-{head}"
        if not (path / "config.json").is_file():
            reward = reward_model_from(load_model(source), head)
            with torch.no_grad():
                reward.norm.mul_(1 + 0.01 * head)
            save_reward_model(reward, path)
        paths.append(str(path))
    return tuple(paths)


def child(module: str, *arguments: str, threads: int) -> dict:
    """Runs a module of this package with `threads` threads and returns the JSON it writes; exits 1 when it fails."""
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            f"bench.end_to_end.{module}",
            *arguments,
            str(result),
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **count, **quiet},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not result.is_file():
            reason = (done.stderr.strip() or done.stdout.strip() or "no output")[-2000:]
            sys.exit(f"{module} {' '.join(arguments[:1])} failed (exit {done.returncode}):\n{reason}")
        return json.loads(result.read_text(encoding="utf-8"))


def check_losses(runs: list[dict]) -> None:
    """Exits 1 unless the first-step losses of all runs agree within LOSS_TOLERANCE."""
    losses = [run["values"][0] for run in runs]
    # Every pair is compared, so that a NaN anywhere (all its comparisons are false) is caught.
    if not all(abs(a - b) <= LOSS_TOLERANCE for a in losses for b in losses):
        told = ", ".join(f"{run['contender']} {run['values'][0]:.6f}" for run in runs)
        sys.exit(
            f"first-step losses differ by more than {LOSS_TOLERANCE}: {told}; this is not the same work, "
            "so no timing counts"
        )


def run_all(options, settings: Settings, check: Callable) -> tuple[list[dict], list[dict]]:
    """(runs, GEMM measurements): alternating runs, a GEMM measurement before and after each."""
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "settings.json")
        write_json(path, settings)
        limits, runs = [child("limit", path, threads=settings.threads)], []
        for number in range(options.runs):
            for name in options.contenders:
                start = time.perf_counter()
                runs.append(child("worker", name, path, threads=settings.threads))
                limits.append(child("limit", path, threads=settings.threads))
                took = time.perf_counter() - start
                say(
                    f"run {number + 1}/{options.runs} {name}: {runs[-1]['seconds']:.1f} s "
                    f"({took:.0f} s with loading and warm-up), first value {runs[-1]['values'][0]:.5f}"
                )
            check(runs)
    return runs, limits


def bf16_is_pointless(options) -> bool:
    """Says so where bf16 is asked for and this CPU has no multiply for it."""
    if options.precision != "bf16":
        return False
    from hpsafety.train.precision import cpu_has_fast_bf16

    if cpu_has_fast_bf16():
        return False
    print("bf16: not measured: no bf16 multiply on this CPU")
    return True


def compete(
    options, settings: Settings, check: Callable = check_losses, tolerance: float = LOSS_TOLERANCE
) -> None:
    """Runs the contenders, prints the table and writes the record that --json asks for."""
    before = machine(settings.threads)
    runs, limits = run_all(options, settings, check)
    groups = make_groups(settings)
    work = {"tokens_equiv": count_tokens(groups), "responses": settings.groups * settings.k,
            "needed_flops": needed_flops(settings)}  # fmt: skip
    summary = summarise(settings, runs, limits, work)
    print_table(settings, summary, before)
    if options.json:
        told = asdict(settings) | {"model": options.model, "reward_models": len(settings.reward_models)}
        record = {"machine": before, "settings": told, "tolerance": tolerance}
        write_json(options.json, record | {"work": work, "summary": summary, "runs": runs, "gemm": limits})
        print(f"wrote {options.json}")
