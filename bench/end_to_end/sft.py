"""SFT, the same work in hpsafety, TRL and a plain transformers loop: python -m bench.end_to_end.sft [--help].

Runs alternate (A B C A B C), each in a process of its own, so that peak memory is its own and noise hits all alike.
Nothing is reported unless the first-step losses agree. See bench/README.md for how to read the table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench.end_to_end.common import Settings, count_tokens, make_pairs, needed_flops, write_json
from bench.end_to_end.table import print_table, summarise
from bench.machine import machine

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "bench"
CONTENDERS = ("hpsafety", "trl", "transformers", "trl-padded")
TOLERANCE = 1e-3  # on the first step's loss, per response token


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits 2 with one line on bad values."""
    p = argparse.ArgumentParser(prog="python -m bench.end_to_end.sft", description=__doc__.split("\n")[0])
    p.add_argument(
        "--model", default="smollm2", help='"smollm2" or a Hugging Face directory (default: smollm2)'
    )
    p.add_argument(
        "--pairs", type=int, default=256, help="prompt/response pairs; 32 for a quick look (default: 256)"
    )
    p.add_argument("--runs", type=int, default=2, help="runs of each contender (default: 2)")
    p.add_argument("--batch", type=int, default=32, help="pairs per optimiser step (default: 32)")
    p.add_argument(
        "--tokens-per-batch", type=int, default=2048, help="tokens per micro-batch (default: 2048)"
    )
    p.add_argument(
        "--peer-tokens-per-batch",
        type=int,
        help="the peers' budget, to give them their best (default: the same)",
    )
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)")
    p.add_argument("--threads", type=int, default=2, help="(default: 2)")
    p.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS[:3]),
        help=f"(default: {' '.join(CONTENDERS[:3])})",
    )
    p.add_argument(
        "--json", type=Path, help="also write machine, versions, settings and all samples to this file"
    )
    options = p.parse_args(arguments)
    if options.peer_tokens_per_batch is None:
        options.peer_tokens_per_batch = options.tokens_per_batch
    for name in ("pairs", "runs", "batch", "tokens_per_batch", "peer_tokens_per_batch", "threads"):
        if getattr(options, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
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
    """Exits 1 unless the first-step losses of all runs agree within TOLERANCE."""
    losses = [run["losses"][0] for run in runs]
    # Every pair is compared, so that a NaN anywhere (all its comparisons are false) is caught.
    if not all(abs(a - b) <= TOLERANCE for a in losses for b in losses):
        told = ", ".join(f"{run['contender']} {run['losses'][0]:.6f}" for run in runs)
        sys.exit(
            f"first-step losses differ by more than {TOLERANCE}: {told}; this is not the same work, "
            "so no timing counts"
        )


def run_all(options: argparse.Namespace, settings: Settings) -> tuple[list[dict], list[dict]]:
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
                    f"({took:.0f} s with loading and warm-up), first-step loss {runs[-1]['losses'][0]:.5f}"
                )
            check_losses(runs)
    return runs, limits


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.precision == "bf16":
        from hpsafety.train.precision import cpu_has_fast_bf16

        if not cpu_has_fast_bf16():
            print("bf16: not measured: no bf16 multiply on this CPU")
            return
    settings = Settings(
        model=model_directory(options.model), pairs=options.pairs, batch=options.batch,
        tokens_per_batch=options.tokens_per_batch, peer_tokens_per_batch=options.peer_tokens_per_batch,
        precision=options.precision, threads=options.threads,
    )  # fmt: skip
    before = machine(settings.threads)
    runs, limits = run_all(options, settings)
    work = {"tokens_equiv": count_tokens(make_pairs(settings)), "needed_flops": needed_flops(settings)}
    summary = summarise(settings, runs, limits, work)
    print_table(settings, summary, before)
    if options.json:
        record = {
            "machine": before,
            "settings": asdict(settings) | {"model": options.model},
            "tolerance": TOLERANCE,
        }
        write_json(options.json, record | {"work": work, "summary": summary, "runs": runs, "gemm": limits})
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
