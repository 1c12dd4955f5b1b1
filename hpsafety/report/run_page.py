"""`hpsafety report RUN [RUN_B]`: one HTML file of all that a run measured, and its numbers and answers as CSV.

The page loads nothing: figures are inline SVG, its one script (the search over the samples) is allowed by its sha256
and by nothing else, and every text that is not ours is escaped.
"""

import base64
import hashlib
import json
import re
import warnings
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.errors import file_error
from hpsafety.files import atomic_write
from hpsafety.report import sections
from hpsafety.report.collect import Run, collect
from hpsafety.report.compare import Line, compare
from hpsafety.report.limits import LIMITS
from hpsafety.report.rows import COLUMNS, SAMPLE_COLUMNS, Number, numbers, sample_rows
from hpsafety.report.run_figures import traces_figure
from hpsafety.report.text import line, visible, write_csv
from hpsafety.safety.eval_page import HEADLINES, HUNDREDTHS
from hpsafety.train.metrics import say

COMPARED = ("metric", "stage", "value A", "n A", "low A", "high A", "judge A", "manifest A", "value B", "n B", "low B",
            "high B", "judge B", "manifest B", "difference", "low", "high", "n", "how")  # fmt: skip


def run(cfg) -> None:
    """hpsafety report: see ReportConfig. Writes OUT.html, OUT.csv and, of one run, samples.csv."""
    found = [collect(path) for path in cfg.runs]
    out = Path(cfg.out) if cfg.out else found[0].path / "report.html"
    if not out.parent.is_dir():
        raise file_error(line(out.parent), "no such directory; --out names a file in one that is there")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a browser has fonts that matplotlib has not
        page, faults = one(found[0]) if len(found) == 1 else two(*found)
    written = [out, out.with_suffix(".csv")]
    if len(found) == 1:
        written.append(out.with_name("samples.csv" if out.stem == "report" else f"{out.stem}-samples.csv"))
        write_csv(written[1], COLUMNS, (n.row() for n in numbers(found[0])))
        write_csv(written[2], SAMPLE_COLUMNS, sample_rows(found[0]))
    else:
        write_csv(written[1], COMPARED, map(_compared, compare(*found)))
    with atomic_write(out) as handle:
        handle.write(page)
    for fault in faults:
        say(f"report: {line(fault, 400)}")
    say(f"report: wrote {', '.join(line(path) for path in written)}")


def _compared(found: Line) -> tuple:
    empty = (None,) * (len(COLUMNS) - 2)
    d = found.difference
    sides = [n.row()[2:] if n else empty for n in (found.a, found.b)]
    return (found.metric, found.stage, *sides[0], *sides[1], d.value, d.low, d.high, d.n, d.how)


def render(template: str, **values) -> str:
    """A template of this folder, every value escaped."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    return environment.get_template(template).render(**values)


def script() -> tuple[Markup, str]:
    """(the page's script, its source expression for the content security policy)."""
    text = files("hpsafety.report").joinpath("search.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), Markup(f"'sha256-{digest}'")


def one(found: Run) -> tuple[str, list[str]]:
    """(the page of one run, what could not be read)."""
    faults = list(found.faults)

    def parts(what: str, make) -> list:
        return sections.attempt(faults, what, make, found) or []

    trained = sections.training(found, faults)
    rows, total = sections.attempt(faults, "samples", sections.samples, found) or ([], 0)
    code, policy = script()
    body = [
        ("The trade", "trade", parts("trade", sections.trade), "no evaluation of adversarial and harmless prompts"),
        ("Safety and helpfulness by stage", "scores", parts("scores", sections.scores),
         "no evaluation with reward models"),
        ("False refusals against violations", "violations", parts("violations", sections.violations),
         "no evaluation with a judge of violations"),
        ("All measures", "measures", parts("measures", sections.measures), "no evaluation"),
        ("Red team", "redteam", parts("redteam", sections.redteam), "no red-team round"),
        ("Reward models", "judges", parts("judges", sections.judges), "no reward model"),
        ("Rejection sampling", "reject", trained["reject"], "no rejection sampling"),
        ("PPO", "ppo", trained["ppo"], "no PPO"),
        ("Distillation of preprompts", "distill", trained["distill"], "no distillation"),
        ("Scaling of safety data", "scaling", trained["scaling"], "no scaling study"),
        ("Training losses", "losses", parts("losses", sections.losses), "no training"),
        ("Corpus audit", "audit", trained["audit"], "no audit"),
    ]  # fmt: skip
    page = render(
        "run.html", title=f"Safety report: {found.title}", run=found, body=unique_ids(body), stages=stage_rows(found),
        samples=rows, total=total, shown=len(rows), script=code, policy=policy, limits=LIMITS,
        faults=[line(f, 400) for f in faults], settings=settings(found),
    )  # fmt: skip
    return page, faults


def two(a: Run, b: Run) -> tuple[str, list[str]]:
    """(the page of two runs side by side, what could not be read)."""
    names = ("A", "B")
    traces = traces_figure([(n, sections.points(run)) for n, run in zip(names, (a, b), strict=True)])
    found: dict[str, list] = {}
    for row in compare(a, b):
        found.setdefault(row.stage, []).append(_compared_cells(row))
    faults = [f"{name}: {fault}" for name, run in zip(names, (a, b), strict=True) for fault in run.faults]
    page = render(
        "compare.html", title=f"Two runs: {a.title} and {b.title}", runs=list(zip(names, (a, b), strict=True)),
        traces=Markup(traces), tables=found, faults=[line(f, 400) for f in faults], limits=LIMITS,
        stages={name: stage_rows(run, f"{name}-") for name, run in zip(names, (a, b), strict=True)},
    )  # fmt: skip
    return page, faults


def _compared_cells(row: Line) -> dict:
    name = HEADLINES.get(row.metric, (row.metric, ""))
    share = row.metric in HEADLINES and not row.metric.startswith(HUNDREDTHS)
    d = row.difference
    change = d.how if d.value is None else shown(d.value, d.low, d.high, share, True)
    return {
        "measure": name[0], "wanted": name[1],
        "a": row.a and written(row.a, share), "b": row.b and written(row.b, share),
        "hashes": (row.a and row.a.hash, row.b and row.b.hash), "change": change,
        "how": d.how + (f", n = {d.n}" if d.n else "") if d.value is not None else "",
    }  # fmt: skip


def written(found: Number, share: bool) -> str:
    n = "" if found.n is None else f", n = {found.n}"
    return shown(found.value, found.low, found.high, share) + n


def shown(value: float, low: float | None, high: float | None, share: bool, signed: bool = False) -> str:
    """'12.0 % (6.0 to 24.0)', '0.512 (0.480 to 0.544)'; of a difference with its sign, a share's in points."""
    scale, form = (100, ".1f") if share else (1, ".3f")
    form = f"+{form}" if signed else form
    unit = (" points" if signed else " %") if share else ""
    spread = "" if low is None or high is None else f" ({scale * low:{form}} to {scale * high:{form}})"
    return f"{scale * value:{form}}{unit}{spread}"


def stage_rows(found: Run, prefix: str = "") -> list[dict]:
    """The manifests' table: each stage with its status, time, versions and settings."""
    rows = []
    for stage in found.stages:
        versions = stage.manifest.get("versions")
        rows.append({
            "name": stage.name, "command": stage.command, "status": stage.status, "why": stage.substituted,
            "seconds": "not measured" if stage.seconds is None else f"{stage.seconds:,.0f}",
            "hash": stage.hash, "id": f"m-{prefix}{stage.hash}",
            "started": line(stage.manifest.get("started") or "not measured", 40),
            "ended": line(stage.manifest.get("ended") or "not measured", 40),
            "config": visible(json.dumps(stage.config, ensure_ascii=False, indent=1), 20_000),
            "versions": visible(json.dumps(versions, ensure_ascii=False, indent=1), 2_000) if versions else "",
        })  # fmt: skip
    return rows


def settings(found: Run) -> str:
    """The TOML text of a pipeline, lines of a sane length."""
    text = found.pipeline.get("config")
    if not isinstance(text, str):
        return ""
    return "\n".join(visible(part, 500) for part in text[:200_000].split("\n"))


def unique_ids(body: list[tuple]) -> list[tuple]:
    """The figures' ids made their own: all of matplotlib's SVGs call their parts alike."""
    out, count = [], 0
    for title, anchor, parts, why in body:
        kept = []
        for part in parts:
            if part.svg:
                count += 1
                svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{count}-", str(part.svg))
                part = replace(part, svg=Markup(svg))
            kept.append(part)
        out.append((title, anchor, kept, why))
    return out
