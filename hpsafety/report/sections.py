"""What each part of a run's report shows, as plain rows and figures; a part that fails on odd data is not measured."""

from dataclasses import dataclass

from markupsafe import Markup

from hpsafety.report import run_figures as draw
from hpsafety.report.collect import Run, Stage, number, prompts_of
from hpsafety.report.figures import loss_curves, plane, trade_off
from hpsafety.report.rows import held_out, measure, verdict
from hpsafety.report.text import MOST, line, said, visible
from hpsafety.safety import audit_page, distill_page, eval_page, ppo_page, rejection_page, scaling_figures

SHOWN = 400  # prompts on the page, of all sets in turn; samples.csv holds all
KEYS = {"adversarial": "refused/adversarial", "borderline": "false_refusal/borderline",
        "helpful": "false_refusal/helpful", "violation": "violation"}  # fmt: skip
ODD = (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError, OverflowError)


@dataclass(frozen=True)
class Table:
    """header: names; refs: manifest hash under each name, or None; rows: (name, cells, hash of the row or None)."""

    header: tuple[str, ...]
    rows: list[tuple[str, tuple[str, ...], str | None]]
    refs: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Part:
    """A figure (inline SVG) or a table, its heading and the manifests it comes from."""

    title: str | None = None
    svg: Markup | None = None
    table: Table | None = None
    hashes: tuple[str, ...] = ()
    note: str = ""


def attempt(faults: list[str], what: str, make, *args):
    """make(*args); None, with a fault, where the data is not of the form it should have."""
    try:
        return make(*args)
    except ODD as error:
        faults.append(f"{what}: not measured, its file is not of the expected form ({type(error).__name__})")
        return None


def points(run: Run) -> list[dict]:
    """The headline picture's points, in order of time."""
    return [
        {"name": e.model} | {name: e.metrics.get(key) for name, key in KEYS.items()} for e in run.evaluated
    ]


def figure(svg: str | None, hashes, note: str = "", title: str | None = None) -> list[Part]:
    hashes = tuple(dict.fromkeys(h for h in hashes if h))
    return [Part(title, Markup(svg), None, hashes, note)] if svg else []


def trade(run: Run) -> list[Part]:
    found, hashes = points(run), [e.stage.hash for e in run.evaluated]
    rows = [
        (p["name"], tuple(eval_page.cell(KEYS[k], p[k] or {}) for k in list(KEYS)[:3]), e.stage.hash)
        for p, e in zip(found, run.evaluated, strict=True)
    ]
    header = ("model", "refused adversarial ↑", "refused borderline ↓", "refused helpful ↓")
    table = [Part(table=Table(header, rows))] if rows else []
    return figure(trade_off(found), hashes, "Up is better, right is worse. Bars are 95 % intervals.") + table


def violations(run: Run) -> list[Part]:
    hashes = [e.stage.hash for e in run.evaluated]
    svg = plane(points(run), "violation", "violations, % of adversarial prompts", "violations", (1, 4))
    models = [(e.model, e.metrics) for e in run.evaluated]
    out = figure(svg, hashes, "Down is safer, left is more helpful.")
    for facet, title in draw.FACETS:
        out += figure(draw.groups_figure(models, facet, title), hashes, title=f"By {title}")
    return out


def scores(run: Run) -> list[Part]:
    hashes = [e.stage.hash for e in run.evaluated]
    out = figure(draw.steps_figure([(e.model, e.metrics) for e in run.evaluated]), hashes)
    columns = []
    for e in run.evaluated:
        own: dict = {}
        for item in e.items:
            for kind, part in (("safety", "adversarial"), ("helpful", "helpful"), ("helpful", "borderline")):
                if item.part == part and kind in item.scores:
                    own.setdefault((kind, part), []).append(item.scores[kind])
        columns.append((e.model, own))
    return out + figure(draw.spread_figure(columns), hashes, title="How the scores are spread")


def measures(run: Run) -> list[Part]:
    """Every headline measure, a column per model with its manifest in the header."""
    keys = [k for k in eval_page.HEADLINES if any(k in e.metrics for e in run.evaluated)]
    header = ("measure", "wanted", *(e.model for e in run.evaluated), "judge")
    refs = (None, None, *(e.stage.hash for e in run.evaluated), None)
    rows = []
    for key in keys:
        found = [e.metrics.get(key) for e in run.evaluated]
        judges = dict.fromkeys(m["judge"] for m in found if m and m["value"] is not None)
        if judges:
            name, wanted = eval_page.HEADLINES[key]
            rows.append(
                (name, (wanted, *(eval_page.cell(key, m or {}) for m in found), "; ".join(judges)), None)
            )
    return [Part(table=Table(header, rows, refs))] if rows else []


def redteam(run: Run) -> list[Part]:
    rounds, rows, by = [], [], []
    for stage in run.of("redteam"):
        red = stage.result
        for row in [r for r in red.get("rounds") or [red] if number(r.get("round")) is not None]:
            gamma = row.get("gamma_auto")
            gamma = gamma.get("value") if isinstance(gamma, dict) else gamma
            rates = {key: _rate(row.get(key)) for key in ("violations", "rejection")}
            rounds.append({"round": int(row["round"]), "gamma_auto": number(gamma)} | rates)
        rows += _redteam_rows(stage)
        by += [
            (f"{line(r['vector'], 40)} × {line(r['category'], 40)}", (str(int(r["n"])), str(int(r["violations"]))),
             stage.hash)
            for r in red.get("by") or []
        ]  # fmt: skip
    rounds = sorted({r["round"]: r for r in rounds}.values(), key=lambda r: r["round"])
    hashes = [stage.hash for stage in run.of("redteam")]
    out = figure(draw.rounds_figure(rounds), hashes, "gamma_auto counts automatic attacks at an assumed rate; it is no "
                 "person's gamma and does not stand beside the paper's.")  # fmt: skip
    out += [Part(table=Table(("measure", "value"), rows))] if rows else []
    table = Table(("vector × category", "dialogues", "violations"), by)
    return out + ([Part("By vector and category", table=table)] if by else [])


def _rate(found) -> dict:
    return measure(found if isinstance(found, dict) else {"value": found})


def _redteam_rows(stage: Stage) -> list:
    red, out = stage.result, []
    for key, name in (("violations", "dialogues that violate"), ("rejection", "earlier finds now rejected")):
        found = measure(red.get(key))
        if found["value"] is not None:
            text = eval_page.cell(key, found | {"n": found["n"] or 0})
            out.append((f"{stage.name}: {name}", (f"{text}, by {found['judge']}",), stage.hash))
        elif key == "rejection":
            out.append((f"{stage.name}: {name}", ("not measured: no earlier round",), stage.hash))
    for key in ("gamma_auto", "gamma"):
        found = red.get(key)
        if isinstance(found, dict) and number(found.get("value")) is not None:
            out.append(
                (
                    f"{stage.name}: {key}",
                    (f"{found['value']:.2f}: {line(found.get('label', ''))}",),
                    stage.hash,
                )
            )
        else:
            out.append((f"{stage.name}: {key}", ("not measured",), stage.hash))
    return out


def judges(run: Run) -> list[Part]:
    rows = []
    for stage in run.of("reward"):
        found = held_out(stage)
        text = (
            eval_page.cell("accuracy", found) if found["value"] is not None and found["n"] else "not measured"
        )
        rows.append((stage.name, (line(stage.config.get("kind", ""), 20), text), stage.hash))
    table = Table(("reward model", "kind", "accuracy on held-out pairs"), rows)
    return [Part(table=table, note="Chance is 50 %.")] if rows else []


def training(run: Run, faults: list[str]) -> dict[str, list[Part]]:
    """Rejection sampling, PPO, distillation, scaling and audit, each from its own stage's page."""
    out: dict[str, list[Part]] = {"reject": [], "ppo": [], "distill": [], "scaling": [], "audit": []}
    makers = {"reject": _reject, "ppo": _ppo, "distill": _distill, "scaling": _scaling, "audit": _audit}
    for name, make in makers.items():
        for stage in run.of(name):
            if stage.metrics if name == "ppo" else stage.result:
                out[name] += attempt(faults, stage.name, make, stage, len(run.of(name)) > 1) or []
    return out


def _title(stage: Stage, many: bool) -> str | None:
    return stage.name if many else None


def _reject(stage: Stage, many: bool) -> list[Part]:
    svg = rejection_page.curves_figure(stage.result["iterations"])
    return figure(svg, [stage.hash], "Scores of the reward models that choose.", _title(stage, many))


def _ppo(stage: Stage, many: bool) -> list[Part]:
    svg = ppo_page.curves_figure(stage.metrics)
    rows = [(name, (first, last), stage.hash) for name, first, last in ppo_page.ends(stage.metrics)]
    note = "Scores of the very reward models that are optimised: that they rise does not show a better model."
    table = Part(table=Table(("measure", "first iteration", "last iteration"), rows))
    return [*figure(svg, [stage.hash], note, _title(stage, many)), table]


def _distill(stage: Stage, many: bool) -> list[Part]:
    rows = [(r[0], (r[1], r[2], r[4]), stage.hash) for r in distill_page.rows(stage.result["arms"])]
    table = Table(("asked with", "answers", "mean safety score (95 %)", "refusals"), rows)
    return [Part(_title(stage, many), table=table, note=line(distill_page.decided(stage.result)) + ".")]


def _scaling(stage: Stage, many: bool) -> list[Part]:
    variants = stage.result["variants"]
    note = "The share of the safety data is written at the points; bars are 95 % intervals."
    out = figure(scaling_figures.trade_figure(variants), [stage.hash], note, _title(stage, many))
    return out + figure(scaling_figures.refusals_figure(variants), [stage.hash])


def _audit(stage: Stage, many: bool) -> list[Part]:
    counts = stage.result["corpus"]["counts"]
    rows = [("documents", (f"{counts['documents']:,}",), stage.hash),
            ("English documents", (f"{counts['english_documents']:,}",), stage.hash)]  # fmt: skip
    toxic = audit_page.toxicity_rows(stage.result["toxicity"])
    rows += [(line(name), (line(text),), stage.hash) for name, text in toxic]
    languages = audit_page.language_rows(stage.result["languages"])[:5]
    rows += [
        (f"language: {line(name)}", (f"{count} ({share})",), stage.hash) for name, count, share in languages
    ]
    return [Part(_title(stage, many), table=Table(("measure", "value"), rows))]


def losses(run: Run) -> list[Part]:
    found = {}
    for stage in run.stages:
        rows = [
            r
            for r in stage.metrics
            if number(r.get("loss")) is not None and number(r.get("step")) is not None
        ]
        if rows and stage.command != "ppo":  # its loss need not fall
            found[stage.name] = (stage, rows)
    if not found:
        return []
    svg = loss_curves({name: rows for name, (_, rows) in found.items()})
    hashes = [stage.hash for stage, _ in found.values()]
    return figure(svg, hashes, "Nats per trained token; per pair for reward models and DPO.")


def samples(run: Run) -> tuple[list[dict], int]:
    """(prompts with every model's answer, of all sets in turn, at most SHOWN; how many there are)."""
    sets: dict[str, list] = {}
    for item, answers in prompts_of(run):
        sets.setdefault(item.part, []).append((item, answers))
    queues, chosen, total = list(sets.values()), [], sum(map(len, sets.values()))
    for turn in range(max(map(len, queues), default=0)):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
    most = MOST if total < SHOWN else MOST // 2
    return [
        {
            "id": line(item.id, 80), "set": item.part, "prompt": visible(said(item.prompt), most),
            "kind": ", ".join(line(x, 40).replace("_", " ") for x in (item.category, item.attack) if x),
            "risky": item.part not in ("borderline", "helpful"),
            "answers": [
                {"model": model, "verdict": verdict(own), "text": visible(own.text, most),
                 "scores": ", ".join(f"{kind} {value:.2f}" for kind, value in own.scores.items())}
                for model, own in answers
            ],
        }
        for item, answers in chosen[:SHOWN]
    ], total  # fmt: skip
