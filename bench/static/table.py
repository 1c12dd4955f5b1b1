"""Markdown tables of static.json, for people and for docs."""

import re

from bench.static.baselines import BASELINES
from bench.static.record import hot

ATTENTION = (
    "kernel", "chip", "configuration", "registers", "spill B, loop", "eq", "other/eq", "MUFU/eq", "LDSM",
    "model: bound, tensor",
)  # fmt: skip
KERNELS = (
    "kernel", "chip", "configuration", "registers", "warps/SM", "spill B, loop", "shared B", "eq", "other/eq", "loads",
    "model: bound",
)  # fmt: skip


STRIDE = re.compile(r"\w+_(TOKEN|HEAD|ROW|STRIDE)=")


def markdown(columns, rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _spill(row: dict) -> str:
    return f"{row['whole']['spill']}, {row['loop_spill']}"


def _model(row: dict) -> str:
    return f"{row['model']['bound']}, {row['model'].get('tensor_use', 0)}"


def _short(config: str) -> str:
    """Without strides, which only say how wide the model is."""
    return " ".join(word for word in config.split() if not STRIDE.match(word))


def attention(rows: list[dict]) -> str:
    """The attention kernels with tensor-core work beside FlashAttention's; alike but for strides is one line."""
    ours = [
        (
            row["kernel"], row["arch"], _short(row["config"]), row["registers"], _spill(row), hot(row)["eq"],
            hot(row)["non_mma_per_eq"], hot(row).get("mufu_per_eq", 0), hot(row).get("ldsm", 0), _model(row),
        )
        for row in rows if row["op"] in ("attention", "cuda attention") and row["whole"]["mma"]
    ]  # fmt: skip
    theirs = [
        (
            f"{one['kernel']} {one['direction']}", one["arch"], f"D{one['head_dim']} {one['tile']}", one["registers"],
            f"{one['spill']}, {one['loop_spill']}", one["eq"], one["non_mma_per_eq"], one["mufu_per_eq"], one["ldsm"],
            f"{one['bound']}, {one['tensor_use']}",
        )
        for one in BASELINES
    ]  # fmt: skip
    return markdown(ATTENTION, [*dict.fromkeys(ours), *theirs])


def _loads(row: dict) -> str:
    """Bits of a lane of the hot code's global loads, most frequent first."""
    words = []
    for kind in ("ldg", "ldgsts", "lds"):
        bits = hot(row).get("widths", {}).get(kind, {})
        if bits:
            words.append(
                f"{kind} " + ", ".join(f"{n}x{b}" for b, n in sorted(bits.items(), key=lambda x: -x[1]))
            )
    return "; ".join(words)


def kernels(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        code = hot(row)
        lines.append([
            row["kernel"], row["arch"], row["config"], row["registers"], row["occupancy"][1], _spill(row),
            row["shared"], code.get("eq", ""), code.get("non_mma_per_eq", ""), _loads(row), row["model"]["bound"],
        ])  # fmt: skip
    return markdown(KERNELS, lines)
