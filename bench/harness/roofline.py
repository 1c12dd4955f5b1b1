"""The roofline picture of a result file: arithmetic intensity against achieved rate, under the roofs of the same run.

A point is one contender of one op (median time), forward with backward where the op has one, at the first shape timed:
filled and labelled for hpsafety's own backends, hollow for peers, with a thin line between the two. Work on either side
of the ridge is held by memory (left) or by the multipliers (right). The colours are those of Okabe and Ito, which
colour-blind readers tell apart; every op is labelled all the same, and dtypes differ by marker.
"""

import math

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = {"float32": "o", "bfloat16": "s"}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
COLUMN = 130  # points nearer than this, in points of print, share a column of labels
LINES = {"float32": "-", "bfloat16": "--"}


def points(record: dict) -> list[dict]:
    """The rows that are drawn, each with intensity (FLOP per byte) and rate (GFLOP/s)."""
    rows = [row for row in record["rows"] if row["flops"] and row["bytes"]]
    shape, directions = {}, {}
    for row in rows:
        shape.setdefault(row["op"], row["shape"])
        directions.setdefault(row["op"], set()).add(row["direction"])
    return [
        {
            "op": row["op"],
            "dtype": row["dtype"],
            "peer": row["peer"],
            "intensity": row["flops"] / row["bytes"],
            "rate": row["flops"] / (row["ms_p50"] * 1e6),
        }
        for row in rows
        if row["shape"] == shape[row["op"]]
        and row["direction"] == ("both" if "both" in directions[row["op"]] else "forward")
    ]


def roofs(record: dict) -> tuple[float, dict[str, float]]:
    """(memory GB/s, dtype -> best GEMM GFLOP/s of the dtypes that were measured)."""
    peaks: dict[str, float] = {}
    for gemm in record["limits"]["gemm_gflops"]:
        peaks[gemm["dtype"]] = max(peaks.get(gemm["dtype"], 0.0), *gemm["routes"].values())
    return record["limits"]["memory_gb_per_s"], peaks


def spread(values: list[float], gap: float) -> list[float]:
    """The values, moved apart (in the order of their size) until neighbours are at least gap from each other."""
    order = sorted(range(len(values)), key=values.__getitem__)
    out = list(values)
    for _ in range(200):
        moved = False
        for low, high in zip(order, order[1:], strict=False):
            short = gap - (out[high] - out[low])
            if short > 1e-9:
                out[low], out[high], moved = out[low] - short / 2, out[high] + short / 2, True
        if not moved:
            break
    return out


def _draw_roofs(axes, bandwidth: float, peaks: dict[str, float], low: float, high: float) -> None:
    import numpy as np

    x = np.geomspace(low, high, 400)
    best = max(peaks.values())
    axes.fill_between(x, np.minimum(bandwidth * x, best), 1e-9, color="#808080", alpha=0.07, linewidth=0)
    start = x[x * bandwidth <= best]
    axes.plot(start, bandwidth * start, color="#404040", linewidth=1.4)
    for dtype, peak in peaks.items():
        right = x[x * bandwidth >= peak]
        axes.plot(right, np.full_like(right, peak), color="#404040", linewidth=1.4, linestyle=LINES[dtype])
        axes.annotate(
            f"best GEMM, {dtype}: {peak:.0f} GFLOP/s", (right[0], peak), (16, 4), textcoords="offset points",
            ha="left", va="bottom", fontsize=8.5, color="#404040",
        )  # fmt: skip


def _label_memory(axes, bandwidth: float, low: float) -> None:
    """Along the slanted roof, at its left end; drawn when the axes have their final limits."""
    (x0, y0), (x1, y1) = axes.transData.transform([(low, low * bandwidth), (low * 10, low * 10 * bandwidth)])
    axes.annotate(
        f"memory: {bandwidth:.1f} GB/s", (low * 1.15, low * 1.15 * bandwidth), (0, 5), textcoords="offset points",
        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)), rotation_mode="anchor", fontsize=8.5, color="#404040",
        ha="left", va="bottom",
    )  # fmt: skip


def _colours(drawn: list[dict]) -> dict[str, str]:
    ops = dict.fromkeys(point["op"] for point in drawn)
    return {op: COLOURS[number % len(COLOURS)] for number, op in enumerate(ops)}


def _groups(drawn: list[dict]) -> dict[tuple, list[dict]]:
    """(op, dtype) -> its contenders, our own first."""
    groups: dict[tuple, list[dict]] = {}
    for point in sorted(drawn, key=lambda point: point["peer"]):
        groups.setdefault((point["op"], point["dtype"]), []).append(point)
    return groups


def _draw_points(axes, drawn: list[dict]) -> None:
    colour = _colours(drawn)
    for (op, dtype), same in _groups(drawn).items():
        rates = [point["rate"] for point in same]
        axes.plot(
            [same[0]["intensity"]] * 2, [min(rates), max(rates)], color=colour[op], linewidth=1, alpha=0.4
        )
        for point in same:
            axes.plot(
                point["intensity"], point["rate"], MARKERS[dtype], markersize=5 if point["peer"] else 8,
                markerfacecolor="white" if point["peer"] else colour[op], markeredgecolor=colour[op],
                zorder=3 if point["peer"] else 4,
            )  # fmt: skip


def _label_points(axes, drawn: list[dict]) -> None:
    """Names to the right of the points that lie in one column, pushed apart, each with a line to its point."""
    colour, several = _colours(drawn), len({point["dtype"] for point in drawn}) > 1
    pixel = axes.figure.dpi / 72
    named = {group: same[0] for group, same in _groups(drawn).items()}
    places = {g: axes.transData.transform((p["intensity"], p["rate"])) for g, p in named.items()}
    columns: list[list] = []
    for group in sorted(named, key=lambda g: places[g][0]):
        if columns and places[group][0] - places[columns[-1][0]][0] < COLUMN * pixel:
            columns[-1].append(group)
        else:
            columns.append([group])
    for groups in columns:
        right = max(places[g][0] for g in groups) + 16 * pixel
        heights = spread([places[g][1] for g in groups], 12 * pixel)
        for group, height in zip(groups, heights, strict=True):
            op, dtype = group
            note = axes.annotate(
                op.rstrip("_") + (f" ({SHORT[dtype]})" if several else ""), places[group], (right, height),
                xycoords="figure pixels", textcoords="figure pixels", va="center", fontsize=9, color=colour[op],
                arrowprops={"arrowstyle": "-", "color": colour[op], "linewidth": 0.6, "alpha": 0.7, "shrinkB": 4,
                            "relpos": (0, 0.5)},
                zorder=5,
            )  # fmt: skip
            note.set_in_layout(False)  # the places are fixed; a new layout would move the points away


def _legend(axes, drawn: list[dict]) -> None:
    from matplotlib.lines import Line2D

    grey = "#404040"
    marks = [
        Line2D([], [], marker=MARKERS[dtype], linestyle=LINES[dtype], color=grey, markersize=7, label=dtype)
        for dtype in dict.fromkeys(point["dtype"] for point in drawn)
    ]
    marks += [
        Line2D([], [], marker="o", linestyle="", color=grey, markersize=7, label="hpsafety"),
        Line2D(
            [], [], marker="o", linestyle="", color=grey, markerfacecolor="white", markersize=5, label="peers"
        ),
    ]
    axes.legend(handles=marks, loc="lower right", frameon=False, fontsize=8.5)


def write(record: dict, path: str) -> None:
    """Draws the picture into a .png or .svg file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = points(record)
    bandwidth, peaks = roofs(record)
    m = record["machine"]
    fig, axes = pyplot.subplots(figsize=(9.5, 6), dpi=150, layout="constrained")
    every = [point["intensity"] for point in drawn] or [1.0]
    ridge = max(peaks.values()) / bandwidth
    low, high = min(*every, ridge) / 3, max(*every, ridge) * 20
    rates = [point["rate"] for point in drawn] or [1.0]
    axes.set(
        xscale="log", yscale="log", xlim=(low, high),
        xlabel="arithmetic intensity: strictly needed FLOP per byte moved",
        ylabel="achieved GFLOP/s (median)", ylim=(min(*rates, low * bandwidth) / 2, max(peaks.values()) * 3),
    )  # fmt: skip
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    threads = f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    where = f"{m.get('gpu', m['cpu'])}, {threads}, torch {m['versions'].get('torch')}"
    axes.set_title(f"Forward and backward under the machine's limits: {where}", loc="left", fontsize=11)
    _draw_roofs(axes, bandwidth, peaks, low, high)
    _draw_points(axes, drawn)
    _legend(axes, drawn)
    fig.canvas.draw()
    _label_memory(axes, bandwidth, low)
    _label_points(axes, drawn)
    fig.savefig(path)
    pyplot.close(fig)
