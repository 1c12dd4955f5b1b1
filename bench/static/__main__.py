"""python -m bench.static [--op OP ...] [--check | --write] [--all] [--attention]

Without a flag: compiles what changed since bench/results/static.json and prints the ops' table.
--check      compiles what changed; exit 1 and a line each where a kernel has a fault or got worse
--write      brings the file up to date; exit 1 where a kernel has a fault, of which a new one is not written
--stale      compiles nothing: exit 1 where the file is not of these sources
--all        compiles everything again instead of taking unchanged rows from the file
--attention  prints the attention kernels beside FlashAttention's, from the file
"""

import argparse
import os
import sys

from bench.static import check, record, table

REMEDY = "run python -m bench.static --write and commit bench/results/static.json"


def gather_cuda(names: list[str]) -> list[dict]:
    """Rows of CUDA ops now; those of the file where there is no nvcc, if they are of these sources."""
    from bench.static import cuda

    if cuda.load_setup().nvcc() is not None:
        return cuda.rows(names)
    if names:
        say("no nvcc here: the CUDA kernels' rows are taken as they stand in static.json")
    wanted = {cuda.PREFIX + name for name in names}
    return [row for row in record.read() if row["op"] in wanted]


def gather(names: list[str], everything: bool) -> tuple[list[dict], dict]:
    """(rows of these ops now, whether each kernel has a tl.dot); rows of the file stand where nothing changed."""
    from bench.static import launches
    from bench.static.compile import all_figures

    known = {} if everything else {(row["op"], row["hash"]): row for row in record.read()}
    found = launches.compilations(names)
    fresh = [one for key, one in found.items() if key not in known]
    figures = dict(zip(map(id, fresh), all_figures(fresh, say=say), strict=True))
    rows, dots = [], {}
    for key, one in found.items():
        old = known.get(key)
        row = record.make_row(one, figures[id(one)]) if old is None else old | _head(one)
        rows.append(row)
        dots[row["op"], row["kernel"]] = "tl.dot(" in launches.source(one.kernel)
    return rows, dots


def _head(one) -> dict:
    """What a row says beside its figures."""
    row = record.make_row(one, {"error": ""})
    del row["error"]
    return row


def stale(names: list[str]) -> list[str]:
    """What the file lacks or has too much, of these ops; compiles nothing."""
    from bench.static import launches

    now = {(op, one.hash): _head(one) for (op, _), one in launches.compilations(names).items()}
    known = {(row["op"], row["hash"]): row for row in record.read() if row["op"] in names}
    out = [f"{check.name(now[key])}: not in static.json" for key in now.keys() - known.keys()]
    out += [
        f"{check.name(known[key])}: in static.json, and no longer launched"
        for key in known.keys() - now.keys()
    ]
    for key in now.keys() & known.keys():
        if now[key]["calls"] != known[key]["calls"] or record.place(now[key]) != record.place(known[key]):
            out.append(f"{check.name(now[key])}: static.json has other calls")
    return sorted(out)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(args: list[str] | None):
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--op", nargs="+", default=[], metavar="OP")
    how = parser.add_mutually_exclusive_group()
    for flag in ("--check", "--write", "--stale", "--attention"):
        how.add_argument(flag, action="store_true")
    parser.add_argument("--all", action="store_true")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    given = parse(args)
    if given.attention:
        print(table.attention(record.read()))
        return 0
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        say("TRITON_INTERPRET is set: kernels are interpreted then, not compiled; unset it")
        return 2
    import triton

    from bench.static import cuda, launches

    every = [*launches.ops(), *(cuda.PREFIX + op for op in cuda.ops())]
    unknown = set(given.op) - set(every)
    if unknown:
        say(f"no such case: {', '.join(sorted(unknown))}; cases: {', '.join(every)}")
        return 2
    names = given.op or every
    cuda_names = [name.removeprefix(cuda.PREFIX) for name in names if name.startswith(cuda.PREFIX)]
    triton_names = [name for name in names if not name.startswith(cuda.PREFIX)]
    if given.stale:
        found = stale(triton_names) + cuda.stale(record.read(), cuda_names)
        print("\n".join(found + [REMEDY] * bool(found)) or "static.json is of these sources")
        return bool(found)
    rows, dots = gather(triton_names, given.all)
    old = record.read()
    found = [check.faults(row, check.shared_bytes(row["op"]), dots[row["op"], row["kernel"]]) for row in rows]
    cuda_rows = gather_cuda(cuda_names)
    found += [check.cuda_faults(row) for row in cuda_rows]
    rows += cuda_rows
    faults = list(
        dict.fromkeys([line for lines in found for line in lines] + check.missing_tensor_cores(rows))
    )
    regressions = check.compare(rows, [row for row in old if row["op"] in names])
    if given.write:
        good = [row for row in rows if "error" not in row]
        record.write([row for row in old if row["op"] not in names] + good, triton.__version__)
        for line in [*faults, *(f"got worse, and is now the record: {line}" for line in regressions)]:
            print(line)
        say(f"{record.PATH.name}: {len(good)} rows of {', '.join(names)}")
        return bool(faults)
    if given.check:
        print("\n".join(faults + regressions) or f"{len(rows)} kernels, no fault")
        changed = sum(row not in old for row in rows)
        gone = len(
            {record.place(row) for row in old if row["op"] in names} - {record.place(row) for row in rows}
        )
        if (changed or gone) and not (faults or regressions):
            print(f"{changed} rows changed, {gone} are gone, nothing is worse: {REMEDY}")
        return bool(faults or regressions)
    print(table.kernels([row for row in rows if "error" not in row]))
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
