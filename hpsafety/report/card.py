"""`hpsafety card RUN`: the model card, card.md with the header that Hugging Face reads and card.html, from a run's
manifests and results (spec section 10: CARD-1 to 4). There is no clock in either: the same run gives the same bytes.
"""

import datetime
import json
import struct
from pathlib import Path

import hpsafety
from hpsafety.data.demo import path as demo_path
from hpsafety.errors import file_error
from hpsafety.files import atomic_write
from hpsafety.report import card_text
from hpsafety.report.card_text import Data, Field, Ref, Section
from hpsafety.report.collect import Run, Stage, collect, number
from hpsafety.report.limits import LIMITS
from hpsafety.report.rows import Number, headline, numbers
from hpsafety.report.run_page import render, shown, stage_rows
from hpsafety.report.text import line
from hpsafety.safety.eval_page import HEADLINES, HUNDREDTHS
from hpsafety.train.metrics import say
from hpsafety.train.rundir import now, sha256, versions

UNKNOWN = "not measured"
SMALL = 1_000_000_000  # parameters below which a model is a demonstration
TUNED = ("sft", "reject", "ppo", "gatt", "distill", "dpo")  # commands that make a chat model
ORDER = {  # stages of spec section 0 -> commands
    "corpus audit (AUD)": ("audit",), "safety fine-tuning (SFT)": ("sft", "scaling"), "reward models (RM)": ("reward",),
    "rejection sampling (RS)": ("reject",), "PPO": ("ppo", "dpo"), "ghost attention (GATT)": ("gatt",),
    "safety context distillation (CD)": ("distill",), "red team (RT)": ("redteam",), "evaluation (EVAL)": ("eval",),
}  # fmt: skip


def run(cfg) -> None:
    """hpsafety card: see CardConfig. Writes card.md, card.html and manifest.json to cfg.out."""
    started, found = now(), collect(cfg.run_dir)
    out = Path(cfg.out) if cfg.out else found.path / "card"
    if out.exists() and not out.is_dir():
        raise file_error(line(out), "--out must be a directory, but a file stands there; choose another")
    sections = make(found, cfg)
    title = f"Model card: {found.title}"
    unfit = why_unfit(found)
    text = card_text.markdown(found.title, unfit, sections, header(found, cfg))
    page = render(
        "card.html",
        title=title,
        unfit=unfit,
        sections=sections,
        stages=stage_rows(found),
        html=card_text.html,
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("card.md", text), ("card.html", page)):
        with atomic_write(out / name) as handle:
            handle.write(content)
    config = {name: getattr(cfg, name) for name in type(cfg).__dataclass_fields__}
    manifest = {
        "stage": "card", "config": config, "code_version": hpsafety.__version__, "seed": None, "versions": versions(),
        "input_hashes": {f"{s.name}/manifest.json": sha256(s.folder / "manifest.json") for s in found.stages if s.hash},
        "output_hashes": {name: sha256(out / name) for name in ("card.md", "card.html")}, "counts": {},
        "started": started, "ended": now(),
    }  # fmt: skip
    with atomic_write(out / "manifest.json") as handle:
        handle.write(json.dumps(manifest, indent=2) + "\n")
    for fault in found.faults:
        say(f"card: {line(fault, 400)}")
    say(f"card: wrote {line(out / 'card.md')} and card.html")


# ---- what the run tells ----


def final(found: Run) -> Stage | None:
    """The stage whose model the run ends with."""
    made = [stage for stage in found.of(*TUNED) if stage.ran]
    return made[-1] if made else None


def base_model(found: Run) -> str | None:
    """What the first training began with: a name, or the last part of a path."""
    for stage in found.of(*TUNED):
        model = stage.config.get("model")
        if isinstance(model, str) and model.strip():
            return line(Path(model).name or model, 100)
    return None


def parameters(stage: Stage | None) -> int | None:
    """Weights of a stage's model, counted from the headers of its safetensors files; None where there are none."""
    total = 0
    for path in sorted((stage.folder / "model").glob("*.safetensors")) if stage else []:
        try:
            with open(path, "rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                tensors = json.loads(handle.read(min(length, 100_000_000)))
            for name, tensor in tensors.items():
                if name != "__metadata__":
                    size = 1
                    for side in tensor["shape"]:
                        size *= int(side)
                    total += size
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
            return None
    return total or None


def why_unfit(found: Run) -> str | None:
    """Why a run is a demonstration, in a sentence (CARD-4); None where nothing says that it is one."""
    if uses_demo_data(found):
        return "It was trained on the demonstration data that comes with hpsafety."
    count = parameters(final(found))
    if count is None:
        return "The size of its model is not measured, so that it counts as a demonstration."
    return (
        f"Its model has {count:,} parameters, fewer than a billion: a demonstration."
        if count < SMALL
        else None
    )


def uses_demo_data(found: Run) -> bool:
    """Whether a stage read a file of the built-in data, or rows that came from it."""
    ours = {sha256(demo_path(name)) for name in ("train", "preferences", "dialogues")}
    for stage in found.stages:
        hashes = stage.manifest.get("input_hashes")
        if isinstance(hashes, dict) and ours & {h for h in hashes.values() if isinstance(h, str)}:
            return True
    for path in sorted(found.path.glob("data/*.jsonl")) + [s.folder / "prompts.jsonl" for s in found.stages]:
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as handle:
                if '"hpsafety-demo"' in handle.readline(100_000):
                    return True
    return "{demo}" in str(found.pipeline.get("config"))


def hours(stage: Stage) -> float | None:
    """Wall time of a stage by its manifest, pauses of a resumed run included."""
    try:
        ends = [datetime.datetime.fromisoformat(stage.manifest[key]) for key in ("started", "ended")]
        return max(0.0, (ends[1] - ends[0]).total_seconds()) / 3600
    except (KeyError, TypeError, ValueError):
        return None


# ---- the fields of Table 52 ----


def make(found: Run, cfg) -> list[Section]:
    return [
        details(found, cfg), use(found, cfg), hardware(found, cfg), data(found, cfg), results(found),
        ethics(found, cfg), stages(found),
        Section("What this cannot show", [Field("Limits", [(text,) for text in LIMITS])]),
    ]  # fmt: skip


def given(text: str | None) -> list[tuple]:
    return [(Data(line(text, 1000)),)] if text else [(UNKNOWN,)]


def details(found: Run, cfg) -> Section:
    last, base = final(found), base_model(found)
    count = parameters(last)
    sizes = (f"{count:,} parameters ", Ref(last.hash)) if count else (f"size {UNKNOWN}",)
    names = [
        part for stage in found.of(*TUNED) if stage.ran for part in (Data(stage.name), Ref(stage.hash), " ")
    ]
    times = sorted(
        str(s.manifest[k]) for s in found.stages for k in ("started", "ended") if s.manifest.get(k)
    )
    trained = [stage for stage in found.of(*TUNED, "reward") if stage.ran]
    method = [p for s in trained for p in (Data(s.name), " (", Data(s.command), ") ", Ref(s.hash), ", ")]
    dates = ("from ", Data(line(times[0], 40)), " to ", Data(line(times[-1], 40))) if times else (UNKNOWN,)
    return Section("Model details", [
        Field("Developers", given(cfg.developers)),
        Field("Variations", [sizes, ("pretrained: ", Data(base) if base else UNKNOWN),
                             ("tuned: ", *(names or (UNKNOWN,)))]),
        Field("Input", [("text",)]),
        Field("Output", [("text",)]),
        Field("Architecture and tuning method", [
            ("decoder-only transformer of the Llama kind; trained with: ", *(method[:-1] or (UNKNOWN,)))]),
        Field("Dates", [dates]),
        Field("Status", [("static, trained on an offline data set",)]),
        Field("License", given(cfg.license)),
        Field("Where to send comments", given(cfg.contact)),
    ])  # fmt: skip


def use(found: Run, cfg) -> Section:
    unfit = why_unfit(found)
    cases = given(cfg.intended_use)
    if unfit and not cfg.intended_use:
        cases = [("research on the method; not fit for deployment",)]
    return Section("Intended use", [
        Field("Use cases", cases), Field("Out-of-scope uses", [
            *(given(cfg.out_of_scope) if cfg.out_of_scope or not unfit else []),
            *([("deployment of any kind",)] if unfit else [])]),
    ])  # fmt: skip


def hardware(found: Run, cfg) -> Section:
    measured = [(stage, hours(stage)) for stage in found.stages if stage.hash]
    known = [(stage, h) for stage, h in measured if h is not None]
    total = sum(h for _, h in known)
    machine = found.pipeline.get("machine")
    if not isinstance(machine, dict):
        written = [s.manifest.get("versions") for s in found.stages]
        machine = next((v for v in written if isinstance(v, dict)), {})
    told = [(Data(line(k, 40)), ": ", Data(line(v, 200))) for k, v in machine.items() if k != "started"]
    devices = dict.fromkeys(line(s.config["device"], 20) for s in found.stages if s.config.get("device"))
    if devices and "device" not in machine:
        told.append(("device asked for: ", Data(", ".join(devices))))
    energy, lines = UNKNOWN, [(Data(s.name), f": {h:.3f} h ", Ref(s.hash)) for s, h in known]
    if cfg.watts is not None and known:
        energy = (
            f"hours × watts / 1000 = {total:.3f} × {cfg.watts:g} / 1000 = {total * cfg.watts / 1000:.4f} kWh"
        )
    refs = [part for stage, _ in known for part in (Ref(stage.hash), " ")]
    return Section("Hardware and software", [
        Field("Device", told or [(UNKNOWN,)]),
        Field("Training factors", [
            (f"sum of the stages below: {total:.3f} h of wall time, from start to end, pauses included",), *lines,
        ] if known else [(UNKNOWN,)]),
        Field("Energy", [(energy, " ", *refs) if energy != UNKNOWN else (energy,)]),
        Field("Carbon footprint", [(f"{UNKNOWN}: the power's carbon intensity is not known to hpsafety",)]),
    ])  # fmt: skip


def data(found: Run, cfg) -> Section:
    rows = []
    for stage in found.of(*TUNED, "reward", "audit", "redteam"):
        hashes, counts = stage.manifest.get("input_hashes"), stage.manifest.get("counts")
        files = (
            [n for n in hashes if not n.endswith((".safetensors", ".json"))]
            if isinstance(hashes, dict)
            else []
        )
        n = number(counts.get("rows")) if isinstance(counts, dict) else None
        listed = ", ".join(line(name, 80) for name in files[:8]) or UNKNOWN
        size = (f"{n:,.0f} rows",) if n is not None else (f"rows {UNKNOWN}",)
        rows.append((Data(stage.name), ": ", Data(listed), ", ", *size, " ", Ref(stage.hash)))
    demo = "the synthetic demonstration data of hpsafety; no user data" if uses_demo_data(found) else (
        f"whether it holds user data: {UNKNOWN}")  # fmt: skip
    return Section("Training data", [
        Field("Overview", [*(rows or [(UNKNOWN,)]), (demo,)]), Field("Freshness", given(cfg.cutoff)),
    ])  # fmt: skip


def results(found: Run) -> Section:
    fields = []
    every = numbers(found)
    for e in found.evaluated:
        own = {n.metric: n for n in every if n.stage == e.model and n.hash == (e.stage.hash or "none")}
        lines = [evaluation_line(own[key]) for key in headline(e.metrics) if key in own]
        fields.append(Field(Data(f"model {e.model}, evaluation {e.stage.name}"), lines or [(UNKNOWN,)]))
    models = {e.model for e in found.evaluated}
    other = [n for n in every if n.stage not in models and not n.metric.startswith(("loss", "ppo/"))]
    other += [n for n in every if n.metric.startswith("redteam/") and n.stage in models]
    fields.append(
        Field("Reward models, red team, audit", [evaluation_line(n) for n in other] or [(UNKNOWN,)])
    )
    told = found.of("eval", "redteam", "audit", "scaling")
    reports = [(Data(f"{s.name}/report.html"), " ", Ref(s.hash)) for s in told]
    fields.append(Field("Evaluation reports", reports or [(UNKNOWN,)]))
    return Section("Evaluation results", fields)


def evaluation_line(n: Number) -> tuple:
    name = HEADLINES.get(n.metric, (n.metric, ""))[0]
    if n.metric.startswith("audit/") and n.metric != "audit/toxic documents":
        text = f"{n.value:,.0f}"
    else:
        text = shown(n.value, n.low, n.high, is_share(n.metric))
    size = "" if n.n is None else f", n = {n.n}"
    stage = () if n.metric in HEADLINES else (Data(n.stage), ", ")
    return (*stage, f"{name}: {text}{size}, by ", Data(n.judge), " ", Ref(n.hash))


def is_share(metric: str) -> bool:
    if metric in HEADLINES:
        return not metric.startswith(HUNDREDTHS)
    return metric in ("held_out_accuracy", "redteam/violation", "redteam/rejection", "audit/toxic documents")


def ethics(found: Run, cfg) -> Section:
    counts = [
        (Data(e.model), ": ", ", ".join(
            f"{sum(i.part == part for i in e.items)} {part}" for part in ("adversarial", "borderline", "helpful")),
         " prompts ", Ref(e.stage.hash or "none")) for e in found.evaluated if e.items
    ]  # fmt: skip
    return Section("Ethics and limits", [
        Field("Languages tested", given(", ".join(cfg.languages) if cfg.languages else None)),
        Field("Limits of coverage", [*(counts or [(f"prompts asked: {UNKNOWN}",)]),
              ("No evaluation covers every situation; the model may answer wrongly, with bias or with harm.",)]),
        Field("Before deployment", [("Test it on your own prompts and languages, with people, before any use.",)]),
    ])  # fmt: skip


def stages(found: Run) -> Section:
    fields = []
    for name, commands in ORDER.items():
        lines = []
        for stage in [s for s in found.stages if s.command in commands]:
            state = "run" if stage.ran else "skipped" if stage.status == "skipped" else "not finished"
            parts = [Data(stage.name), f": {state} ", Ref(stage.hash) if stage.hash else "no manifest"]
            parts += [", substituted: ", Data(stage.substituted)] if stage.substituted else []
            lines.append(tuple(parts))
        fields.append(Field(name, lines or [("skipped",)]))
    return Section("Stages run, skipped and substituted", fields)


# ---- the header that Hugging Face reads ----


def header(found: Run, cfg) -> dict:
    """license, language, base_model, tags, pipeline_tag and model-index with the last model's results."""
    last = found.evaluated[-1] if found.evaluated else None
    metrics = [
        {"type": line(n.metric), "name": HEADLINES[n.metric][0], "value": n.value, "verified": False,
         "args": {"manifest": n.hash, "judge": n.judge, "n": n.n, "low": n.low, "high": n.high}}
        for n in numbers(found) if last and n.stage == last.model and n.metric in HEADLINES
    ]  # fmt: skip
    result = {
        "task": {"type": "text-generation"}, "dataset": {"type": "held-out", "name": "held-out prompts"},
        "metrics": metrics,
    }  # fmt: skip
    return {
        "license": line(cfg.license) if cfg.license else "unknown", "language": list(cfg.languages) or ["und"],
        "base_model": base_model(found) or UNKNOWN, "tags": ["hpsafety", "safety", "rlhf"],
        "pipeline_tag": "text-generation",
        "model-index": [{"name": found.title, "results": [result] if metrics else []}],
    }  # fmt: skip
