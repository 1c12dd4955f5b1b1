"""Plants one bug at a time in the kernels and demands that the op's tests notice: make test-mutations.

Every mutant (the TOML files beside this module) becomes a library, or a copy of the kernels' folder, of its own; its
op's test file runs on it and must fail. A control run of each op, built the same way from the unchanged sources, must
pass, or a failure would prove nothing. A mutant that no test kills, and one whose text the sources no longer hold, is
an error.
"""

import argparse
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.mutations.build import Builder, DoesNotCompile, cuda_copy, triton_copy
from tests.mutations.mutants import FOLDER, ROOT, Mutant, control, load

RESULTS = ROOT / "build" / "mutations.json"
LIMIT_S = 120
CUDA_LIMIT_S = 400  # a mutant's sanitizer programs are compiled within
SIMT_DIED = 97  # how csrc/simt ends a process: a deadlock, a barrier reached from two lines
GOOD = {"killed", "crashed", "hung", "equivalent", "passed"}


def run_tests(mutant: Mutant, library: Path) -> dict:
    """{"status", "test", "by"} of the op's tests on one library."""
    report = library.with_name(library.name + ".json")
    report.unlink(missing_ok=True)
    extra = {"HPSAFETY_MUTANT": str(library), "HPSAFETY_MUTANT_REPORT": str(report)}
    plugin = ["-p", "tests.mutations.plugin", "-p", "no:cacheprovider"]
    plugin += ["-m", "not slow and not sweep"] if mutant.is_cuda else []  # with the sanitizers
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", *plugin, *mutant.tests],
        cwd=ROOT,
        env={**os.environ, **extra, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=CUDA_LIMIT_S if mutant.is_cuda else LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        process.returncode = None
    seen = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    return judge(process.returncode, seen, library, output)


def judge(code: int | None, seen: dict, library: Path, output: str) -> dict:
    """What an exit code (None: too slow) and the plugin's report say."""
    test = (seen.get("test") or "").rpartition("/")[2]
    if code is None:
        return {"status": "hung", "test": test, "by": f"no end within {LIMIT_S} s"}
    if code < 0:
        return {"status": "crashed", "test": test, "by": signal.Signals(-code).name}
    if code == SIMT_DIED:
        return {"status": "crashed", "test": test, "by": "csrc/simt"}
    if code in (0, 1) and seen.get("library") != library.name:
        return {"status": "error", "test": test, "by": f"the tests ran on {seen.get('library')}"}
    if code == 0:
        return {"status": "survived", "test": "", "by": ""}
    if code == 1 and seen.get("error"):
        return {"status": "killed", "test": test, "by": seen["error"]}
    return {"status": "error", "test": test, "by": f"pytest exit {code}: {output[-400:]}"}


def run_one(builder: Builder | None, mutant: Mutant) -> dict:
    started = time.monotonic()
    row = {"op": mutant.op, "name": mutant.name, "kind": mutant.kind}
    row |= {"status": "equivalent", "test": "", "by": mutant.equivalent}
    if not mutant.equivalent:
        try:
            copy = triton_copy if mutant.is_triton else cuda_copy if mutant.is_cuda else builder.library
            row |= run_tests(mutant, copy(mutant))
        except ValueError as error:
            row |= {"status": "stale", "by": str(error)}
        except DoesNotCompile as error:
            row |= {"status": "does not compile", "by": str(error)}
    if mutant.name == "control":  # here the tests must pass
        row["status"] = "passed" if row["status"] == "survived" else "control failed"
    return row | {"seconds": round(time.monotonic() - started, 1)}


def run_all(mutants: list[Mutant], jobs: int) -> list[dict]:
    """Controls first; `jobs` mutants at a time, so that one compiles while another is tested."""
    builder = Builder() if any(not m.is_triton and not m.is_cuda for m in mutants) else None
    controls = {m.op: control(m) for m in mutants if not m.equivalent}
    rows = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run_one, builder, m) for m in [*controls.values(), *mutants]]
        try:
            for done in concurrent.futures.as_completed(waiting):
                rows.append(done.result())
                keep(rows[-1:])
                print(line(rows[-1]), flush=True)
        finally:  # an interrupt does not wait for the mutants that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
    return sorted(rows, key=lambda row: (row["op"], row["name"] != "control", row["name"]))


def line(row: dict) -> str:
    what = " ".join(part for part in (row["test"], row["by"]) if part)
    name = f"{row['op']}/{row['name']}"
    return f"{row['status']:10} {row['seconds']:6.1f} s  {name:50} {row['kind']:24} {what}"


def keep(rows: list[dict]) -> list[dict]:
    """These rows and, of an earlier run, those of mutants that are still listed; written to RESULTS."""
    listed = {m.id for m in load()}
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    kept = {f"{r['op']}/{r['name']}": r for r in old}
    kept = {key: row for key, row in kept.items() if key in listed or row["name"] == "control"}
    kept |= {f"{r['op']}/{r['name']}": r for r in rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(list(kept.values()), indent=1) + "\n", encoding="utf-8")
    return list(kept.values())


HEAD = """# Mutants

Written by `make test-mutations ARGS=--write`; do not edit. One planted bug a line, in the kernels' sources as they
ship, and the first test that fails on it. `crashed` and `hung` count as killed. How to add one: `mutants.py`.

| op | mutant | class | outcome |
| --- | --- | --- | --- |
"""


def write_table(rows: list[dict]) -> None:
    """README.md, from the results of this run and of earlier ones; what was run elsewhere keeps its line."""
    found = {f"{r['op']}/{r['name']}": r for r in rows}
    path = FOLDER / "README.md"
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    told = {
        tuple(line.split(" | ")[:3]): line.split(" | ", 3)[3].removesuffix(" |")
        for line in old
        if " | " in line
    }
    lines = []
    for m in sorted(load(), key=lambda m: m.id):
        row = found.get(m.id)
        outcome = told.get((f"| {m.op}", m.name, m.kind), "not run")
        if row is not None:
            outcome = f"{row['status']}: {row['by']}" if m.equivalent else row["status"]
            if row["test"]:
                outcome += f" by `{row['test']}`" + ("" if row["status"] == "killed" else f" ({row['by']})")
        lines.append(f"| {m.op} | {m.name} | {m.kind} | {outcome.replace('|', '/')} |\n")
    path.write_text(HEAD + "".join(lines), encoding="utf-8")


def choose(mutants: list[Mutant], only: list[str], fifth: int | None) -> list[Mutant]:
    chosen = [m for m in mutants if any(text in m.id for text in only)]
    return chosen if fifth is None else [m for i, m in enumerate(chosen) if i % 5 == fifth % 5]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-mutations", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="those whose op/name holds a TEXT"
    )
    parser.add_argument("--fifth", type=int, metavar="N", help="every fifth mutant, beginning at N modulo 5")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="names the mutants and stops")
    parser.add_argument("--write", action="store_true", help="writes tests/mutations/README.md too")
    args = parser.parse_args()
    mutants = choose(load(), args.only, args.fifth)
    if args.list or not mutants:
        print("\n".join(f"{m.id:50} {m.kind}" for m in mutants) or "no such mutant")
        return 0 if mutants else 1
    started = time.monotonic()
    rows = run_all(mutants, args.jobs)
    if args.write:
        write_table(keep([]))
    bad = [row for row in rows if row["status"] not in GOOD]
    counts = {s: sum(r["status"] == s for r in rows) for s in sorted({r["status"] for r in rows})}
    print(f"\n{len(rows)} runs in {time.monotonic() - started:.0f} s: {counts}; {RESULTS.relative_to(ROOT)}")
    for row in bad:
        print(line(row))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
