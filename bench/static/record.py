"""bench/results/static.json: a row per kernel, chip and configuration, and FlashAttention's own rows beside them."""

import collections
import json
from pathlib import Path

from bench.static.baselines import BASELINES

PATH = Path(__file__).resolve().parents[1] / "results" / "static.json"
ABOUT = {
    "how": "python -m bench.static --write; read from the code of a compiler, nothing was run",
    "row": "a kernel as compiled for a chip; calls: shapes -> [function, its call, programs, bytes, times]",
    "types": "of the arguments; D: divisible by 16, None or a number: compiled in",
    "hot": "the loop with the most tensor-core work, per iteration and warp; left out where it is the whole kernel",
    "eq": "tensor-core work of a warp in HMMA.16816; an HGMMA.64xNx16 is N/8",
    "spill": "bytes a lane moves to and from its stack: whole kernel, and loop_spill in any loop",
    "model": "cycles of the hot loop on each pipe of a scheduler: a model, not a measurement",
}
WHOLE = ("instructions", "mma", "eq", "mufu", "barriers", "atomics", "spill")  # beside a hot loop


def make_row(one, figures: dict) -> dict:
    """A launches.Compilation and its figures as they stand in the file: no zeros, whole numbers whole."""
    counted = collections.Counter(
        (call.shapes, call.function, call.call, call.launch.programs, call.bytes) for call in one.calls
    )
    calls: dict[str, list] = {}
    for (shapes, *launched), times in counted.items():
        calls.setdefault(shapes, []).append([*launched, times])
    head = {
        "op": one.calls[0].op,
        "kernel": one.kernel.__name__,
        "arch": f"sm_{one.arch}",
        "config": one.config,
        "types": one.types,
        "hash": one.hash,
        "calls": calls,
    }
    return head | figures if "error" in figures else compact_row(head, figures)


def compact_row(head: dict, figures: dict) -> dict:
    body = dict(figures)
    body["occupancy"] = [*body["occupancy"].values()]
    if body["hot"] == body["whole"]:
        del body["hot"]
    else:
        body["whole"] = {name: body["whole"][name] for name in WHOLE}
    if not body["stack"]:
        del body["stack"]
    return head | {name: _compact(value) for name, value in body.items()}


def _compact(value):
    if isinstance(value, dict):
        return {key: _compact(x) for key, x in value.items() if x or key in ("spill", "mma")}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def hot(row: dict) -> dict:
    return row.get("hot", row["whole"])


def place(row: dict) -> tuple:
    """A row's place in the file; no two have the same."""
    return row["op"], row["kernel"], row["arch"], row["config"], row["types"]


def read(path: Path = PATH) -> list[dict]:
    """The rows; none where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def write(rows: list[dict], version: str, path: Path = PATH) -> None:
    """One line a row, sorted, so that a difference between two versions can be read."""

    def lines(many: list[dict]) -> str:
        return ",\n".join(json.dumps(one, separators=(",", ":")) for one in many)

    about = json.dumps(ABOUT | {"triton": version}, indent=1)
    parts = (
        f'"about":{about}',
        f'"baselines":[\n{lines(BASELINES)}\n]',
        f'"rows":[\n{lines(sorted(rows, key=place))}\n]',
    )
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
