"""What the check refuses: faults of a row on its own, and rows that got worse than the ones on record."""

import importlib

from bench.static import sass
from bench.static.record import hot, place
from bench.static.work import CUDA_SPILLS, KNOWN_SPILLS, MAY_SPILL, idle

# Ops whose main work is a matrix product: some kernel of each launch function named here must use tensor cores. Any
# kernel with a tl.dot must as well, but for those of fp32 operands, whose product is exact to fp32.
TENSOR_CORES = {
    "attention": ("attention", "attention_backward"),
    "linear_logprob": ("linear_logprob", "linear_logprob_backward"),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "distill_loss": ("distill_loss", "distill_loss_backward"),
}
FP32_DOTS: set[str] = set()  # kernels
SLACK = 1.03


def shared_bytes(op: str) -> tuple[int, int] | None:
    """SHARED_BYTES of triton_kernels/<op>.py; None where there is no such file."""
    try:
        module = importlib.import_module(f"hpsafety.triton_kernels.{op}")
    except ModuleNotFoundError:
        return None
    return getattr(module, "SHARED_BYTES", None)


def name(row: dict) -> str:
    return f"{row['op']}: {row['kernel']} on {row['arch']} ({row['config']})"


def _too_much_shared(row: dict) -> list[str]:
    most = sass.LIMITS[int(row["arch"][3:])][3]
    return (
        [f"{row['shared']} bytes of shared memory, a block has {most} at most"]
        if row["shared"] > most
        else []
    )


def faults(row: dict, declared: tuple[int, int] | None, dots: bool) -> list[str]:
    """What is wrong with a row by itself. declared: the op's SHARED_BYTES; dots: the kernel's text has a tl.dot."""
    if "error" in row:
        return [f"{name(row)}: does not compile: {row['error']}"]
    out, arch = [], int(row["arch"][3:])
    spills = row["loop_spill"], hot(row).get("spill", 0)
    known = KNOWN_SPILLS.get((row["kernel"], row["arch"]), (0, 0))
    if any(a > b for a, b in zip(spills, known, strict=True)) and not (
        idle(row) and row["kernel"] in MAY_SPILL
    ):
        out.append(
            f"a loop spills {spills[0]} bytes, the hot loop {spills[1]}; known are {known[0]} and {known[1]}"
        )
    out += _too_much_shared(row)
    if declared is None:
        out.append(f"triton_kernels/{row['op']}.py does not say its SHARED_BYTES")
    elif row["shared"] > declared[arch >= 90]:
        out.append(f"{row['shared']} bytes of shared memory, SHARED_BYTES says {declared[arch >= 90]}")
    if dots and not row["whole"]["mma"] and row["kernel"] not in FP32_DOTS:
        out.append("tl.dot without a tensor-core instruction")
    return [f"{name(row)}: {line}" for line in out]


def cuda_faults(row: dict) -> list[str]:
    """The same of a CUDA kernel's row: nothing may spill in a loop but what CUDA_SPILLS names."""
    out = _too_much_shared(row)
    spilled = max(row["loop_spill"], hot(row).get("spill", 0))
    if spilled > CUDA_SPILLS.get((row["config"], row["arch"]), 0):
        out.append(f"a loop spills {spilled} bytes")
    return [f"{name(row)}: {line}" for line in out]


def missing_tensor_cores(rows: list[dict]) -> list[str]:
    """Launch functions of TENSOR_CORES none of whose kernels has a tensor-core instruction, chip by chip."""
    out = []
    for op, functions in TENSOR_CORES.items():
        for arch in sorted({row["arch"] for row in rows if row["op"] == op}):
            mine = [row for row in rows if row["op"] == op and row["arch"] == arch and "error" not in row]
            busy = {
                one[0]
                for row in mine
                if row["whole"]["mma"]
                for calls in row["calls"].values()
                for one in calls
            }
            out += [
                f"{op}: {function} on {arch} uses no tensor cores"
                for function in functions
                if function not in busy
            ]
    return out


def load_width(row: dict) -> float:
    """Bits of a lane that a global load of the hot code moves, in the mean over what they move."""
    loads: dict[str, int] = {}
    for kind in ("ldg", "ldgsts"):
        for bits, number in hot(row).get("widths", {}).get(kind, {}).items():
            loads[bits] = loads.get(bits, 0) + number
    moved = sum(int(bits) * number for bits, number in loads.items())
    return sum(int(bits) ** 2 * number for bits, number in loads.items()) / moved if moved else 0.0


def worse(new: dict, old: dict) -> list[str]:
    """What got worse from one row to another of the same kernel and chip."""
    out = []
    if new["registers"] > old["registers"] and new["occupancy"][1] < old["occupancy"][1]:
        out.append(
            f"registers {old['registers']} -> {new['registers']}, warps {old['occupancy'][1]} -> {new['occupancy'][1]}"
        )
    for key in ("spill", "loop_spill"):
        a, b = (row["whole"]["spill"] if key == "spill" else row[key] for row in (old, new))
        if b > a:
            out.append(f"{key} {a} -> {b} bytes")
    a, b = (hot(row).get("non_mma_per_eq") for row in (old, new))
    if a is not None and (b is None or b > a * SLACK):
        out.append(f"other instructions per eq {a} -> {b}")
    a, b = load_width(old), load_width(new)
    if 0 < b < a / SLACK:
        out.append(f"loads of {a:.0f} -> {b:.0f} bits")
    return [f"{name(new)}: {line}" for line in out]


def counterparts(new: dict, old_rows: list[dict]) -> list[dict]:
    """The rows on record that a row replaces: its own configuration, else what the same calls launched."""
    same = [old for old in old_rows if place(old) == place(new)]
    if same:
        return same
    calls = _calls(new)
    return [old for old in old_rows if place(old)[:3] == place(new)[:3] and calls & _calls(old)]


def _calls(row: dict) -> set:
    return {(shapes, one[0], one[1]) for shapes, calls in row["calls"].items() for one in calls}


def compare(rows: list[dict], old_rows: list[dict]) -> list[str]:
    """What got worse in any row since the record, a line each; "error" rows are faults of their own."""
    out = []
    for row in rows:
        if "error" not in row:
            for old in counterparts(row, old_rows):
                if old["hash"] != row["hash"]:
                    out += worse(row, old)
    return list(dict.fromkeys(out))
