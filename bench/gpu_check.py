"""One machine's proof, in one JSON: python -m bench.gpu_check, or bench/gpu_check.sh.

Every part runs in processes of its own and fails alone: its row then says ok: false and why, and the others go on. The
exit code is 1 when any part failed.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.machine import gpu, machine
from hpsafety.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
LOSS_TOLERANCE = 2e-3  # relative, fp32 on both sides: sums in another order, grown over 20 steps
RATIO_TOLERANCE = 1e-6  # of PPO's first ratio, which is 1 exactly where sampler and trainer are one
PROMPTS = ["what is a good way to learn", "name three colours", "how do plants grow", "tell me a story"]


class Check:
    """What is run, where, and what came of it."""

    def __init__(self, dry: bool, seconds: float, work: Path):
        self.dry, self.work = dry, work
        self.device = "cpu" if dry else "cuda"
        self.gpus = 1 if dry else torch.cuda.device_count()
        self.ends = time.monotonic() + seconds
        self.rows: dict[str, dict] = {}

    def run(self, *command: str, **environment: str) -> str:
        """What a module's command line prints. RuntimeError, with its last lines, when it fails or is too slow."""
        left = self.ends - time.monotonic()
        if left < 5:
            raise RuntimeError("no time left: --minutes")
        given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=given,
                capture_output=True,
                text=True,
                timeout=left,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{' '.join(command[:3])}: no end within {left:.0f} s") from error
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command[:4])}: exit {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
            )
        return done.stdout

    def part(self, name: str, call) -> None:
        started = time.monotonic()
        try:
            row = {"ok": True} | call(self)
        except Exception as error:  # a part's failure is a result
            row = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        self.rows[name] = row | {"seconds": round(time.monotonic() - started, 1)}
        print(
            f"{name:16} {'ok' if row['ok'] else 'FAILED':7} {self.rows[name]['seconds']:8.1f} s", flush=True
        )


def kernel_tests(check: Check) -> dict:
    """Triton's and CUDA's tests: on the device, against the fp64 oracle; dry: an op's of each, on the CPU."""
    small = ["tests/triton/test_rms_norm.py", "tests/cuda/test_reward_score.py", "-k", "not replay"]
    tests = small if check.dry else ["tests/triton", "tests/cuda", "-m", "not slow"]
    out = check.run("pytest", "-q", "-p", "no:cacheprovider", *tests)
    return {"summary": out.strip().splitlines()[-1]}


def ops_table(check: Check) -> dict:
    """What serves each op on this machine."""
    return {"table": check.run("hpsafety", "ops").splitlines()}


def defaults(rows: list[dict]) -> list[dict]:
    """Of each op, shape, dtype and direction that Triton and CUDA were timed at: which is faster, and by how much."""
    cases: dict[tuple, dict] = {}
    for row in rows:
        if row["impl"] in ("triton", "cuda"):
            key = (row["op"], json.dumps(row["shape"]), row["dtype"], row["direction"])
            cases.setdefault(key, {})[row["impl"]] = row["ms_p50"]
    out = []
    for (op, shape, dtype, direction), ms in cases.items():
        if len(ms) == 2:
            best = min(ms, key=ms.get)
            ratio = round(max(ms.values()) / min(ms.values()), 3)
            out.append({"op": op, "shape": json.loads(shape), "dtype": dtype, "direction": direction,
                        "default": best, "times_faster": ratio})  # fmt: skip
            print(f"  {op} {shape} {dtype} {direction}: {best} should be the default, {ratio} times faster")
    return out


def microbenchmarks(check: Check) -> dict:
    """Median times and the share of this machine's limit, per op and backend; which of two backends is the better."""
    out, rows = check.work / "ops.json", []
    names = ["swiglu", "--shape", "T=64,F=64", "--seconds", "0.05"] if check.dry else ["all"]
    for dtype in ("float32",) if check.dry else ("float32", "bfloat16"):
        check.run("hpsafety", "bench", *names, "--dtype", dtype, "--device", check.device, "--json", str(out))
        report = json.loads(out.read_text(encoding="utf-8"))
        rows += [{k: v for k, v in row.items() if k != "samples_ms"} for row in report["rows"]]
    return {"rows": rows, "defaults": defaults(rows)}


@functools.cache
def inputs(work: Path) -> dict[str, str]:
    """A small random chat model, two reward models on it, demonstrations and prompts, as files."""
    from hpsafety.model.heads import reward_model_from
    from hpsafety.model.io import load_model, save_model
    from hpsafety.model.reward_io import save_reward_model
    from tests.stages.conftest import write_tokenizer
    from tests.tiny import tiny_model

    paths = {
        name: str(work / name) for name in ("model", "safety", "helpful", "demos.jsonl", "prompts.jsonl")
    }
    shape = {
        "width": 128,
        "mlp_width": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "max_positions": 512,
    }
    save_model(tiny_model(seed=2, **shape), paths["model"])
    write_tokenizer(Path(paths["model"]))
    for seed, name in enumerate(("safety", "helpful")):
        save_reward_model(reward_model_from(load_model(paths["model"]), seed=seed + 5), Path(paths[name]))
    rows = [{"prompt": f"{p} {i}", "response": f"{p} {i}, and so on"} for i in range(24) for p in PROMPTS]
    risky = {"is_safety": True, "category": "advice", "attack": "other"}
    asked = [{"prompt": f"{p} {i}"} | (risky if i % 2 else {}) for i in range(4) for p in PROMPTS]
    for name, lines in (("demos.jsonl", rows), ("prompts.jsonl", asked)):
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return paths


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Relative, at the worst place; infinite where the lengths differ."""
    if len(ours) != len(theirs):
        return float("inf")
    return max((abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def fine_tuning(check: Check) -> dict:
    """20 steps of `hpsafety sft` on the device and on the CPU; on several GPUs under torchrun too."""
    paths, steps = inputs(check.work), "3" if check.dry else "20"
    flags = ["--model", paths["model"], "--data", paths["demos.jsonl"], "--steps", steps, "--batch", "8"]
    flags += ["--lr", "1e-3", "--precision", "fp32", "--checkpoint-every", "0"]
    launches = {"the CPU": ["hpsafety"], "the device": ["hpsafety"]}
    if check.gpus > 1:
        launches["all GPUs"] = ["torch.distributed.run", f"--nproc-per-node={check.gpus}", "-m", "hpsafety"]
    losses, rates = {}, {}
    for name, start in launches.items():
        out = check.work / f"sft-{name.replace(' ', '-')}"
        device = "cpu" if name == "the CPU" else check.device
        check.run(*start, "sft", *flags, "--device", device, "--out", str(out))
        rows = metrics(out)
        losses[name], rates[name] = [row["loss"] for row in rows], rows[-1]["tokens_per_s"]
    worst = {
        name: largest_difference(row, losses["the CPU"]) for name, row in losses.items() if name != "the CPU"
    }
    if max(worst.values()) > LOSS_TOLERANCE:
        raise RuntimeError(f"losses differ from the CPU's by {worst}: {losses}")
    return {"steps": int(steps), "losses": losses, "largest_difference": worst, "tokens_per_s": rates}


def ppo(check: Check) -> dict:
    """One iteration on the device and on the CPU: the first ratio, and the figures side by side."""
    paths, figures = inputs(check.work), {}
    flags = ["--model", paths["model"], "--safety-rm", paths["safety"], "--helpful-rm", paths["helpful"]]
    flags += ["--data", paths["prompts.jsonl"], "--iterations", "1", "--batch", "16", "--minibatch", "8"]
    flags += ["--max-new-tokens", "24", "--precision", "fp32"]
    for name, device in (("the CPU", "cpu"), ("the device", check.device)):
        out = check.work / f"ppo-{name.replace(' ', '-')}"
        check.run("hpsafety", "ppo", *flags, "--device", device, "--out", str(out))
        figures[name] = metrics(out)[-1]
    ratios = [row["ratio_max_first"] for row in figures.values()]
    if max(abs(ratio - 1) for ratio in ratios) > RATIO_TOLERANCE:
        raise RuntimeError(f"the first ratio is not 1: {ratios}")
    return {"figures": figures}


def generation(check: Check) -> dict:
    """Greedy and drawn samples on the device beside the CPU's: the share of equal texts, and tokens a second."""
    paths, texts = inputs(check.work), {}
    for temperature in ("0", "1"):
        for place, device in enumerate(("cpu", check.device)):
            out = check.work / f"samples-{place}-{temperature}.jsonl"
            flags = ["--model", paths["model"], "--data", paths["prompts.jsonl"], "--k", "4"]
            flags += ["--max-new-tokens", "32", "--temperature", temperature, "--precision", "fp32"]
            check.run("hpsafety", "sample", *flags, "--device", device, "--out", str(out))
            rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
            texts[place, temperature] = [response for row in rows for response in row["responses"]]
    equal = {
        f"temperature {t}": sum(a == b for a, b in zip(texts[0, t], texts[1, t], strict=True))
        / len(texts[0, t])
        for t in ("0", "1")
    }
    if min(equal.values()) < 0.9:  # a near tie may fall the other way
        raise RuntimeError(f"only {equal} of the samples are the CPU's")
    return {"equal": equal}


PARTS = {
    "ops": ops_table,
    "kernel tests": kernel_tests,
    "fine-tuning": fine_tuning,
    "ppo": ppo,
    "generation": generation,
    "microbenchmarks": microbenchmarks,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on a CPU, small: checks the check")
    parser.add_argument("--out", help="the JSON; bench/results/gpu_<name>.json if absent")
    parser.add_argument("--minutes", type=float, default=60, help="of all parts together (default: 60)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print(
            "bench/gpu_check.sh: there is no CUDA GPU here; --dry goes through the motions on a CPU",
            file=sys.stderr,
        )
        return 2
    name = "dry" if options.dry else torch.cuda.get_device_name().replace(" ", "_").lower()
    out = Path(options.out or ROOT / "bench" / "results" / f"gpu_{name}.json")
    with tempfile.TemporaryDirectory() as work:
        check = Check(options.dry, 60 * options.minutes, Path(work))
        for part in options.only:
            check.part(part, PARTS[part])
    about = machine(torch.get_num_threads()) | gpu(check.device)
    result = {"machine": about, "gpus": check.gpus, "dry": check.dry, "parts": check.rows}
    with atomic_write(out) as handle:
        handle.write(json.dumps(result, indent=1) + "\n")
    print(f"wrote {out}")
    return 0 if all(row["ok"] for row in check.rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
