"""A red-team round: attacks on a model, what they found, and whether it still falls for what was found before (spec
section 8, RT-1 to 7).

OUT/redteam.json      the figures, the four summaries, and those of the rounds before
    dialogues.jsonl   every attack with the model's answers, judged
    finds.jsonl       what violated, as prompts to train on (split rt_train)
    replay.jsonl      earlier violations asked again; pairs.jsonl: preferences from what is mitigated now
    report.html       all of it for people
    jobs/             the files of hpsafety/safety/redteam_job.py, from which all of it follows
"""

import dataclasses
import json
import shutil
from pathlib import Path

from hpsafety.data.records import normalise_prompt, write_records
from hpsafety.data.sources import load_rows
from hpsafety.errors import InputError
from hpsafety.files import atomic_write
from hpsafety.model.io import load_model
from hpsafety.model.reward_io import load_reward_model
from hpsafety.safety import redteam_job
from hpsafety.safety.attacks import SHIPPED, choose_attacks, load_templates, sort_seeds
from hpsafety.safety.gamma import gamma, read_sessions
from hpsafety.safety.garak_import import read_garak
from hpsafety.safety.redteam_judge import judge_name, load_answer_judge
from hpsafety.safety.redteam_page import show_tables, write_page
from hpsafety.safety.redteam_report import dialogue_row, finds, finds_note, first_prompt_row, result_of
from hpsafety.safety.risk_areas import AREAS
from hpsafety.safety.rounds import (
    FILES,
    chain_of,
    found_before_of,
    other_judge,
    preference_pairs,
    read_rounds,
    replay_rows,
)
from hpsafety.safety.talk_job import check_chat
from hpsafety.train import distributed, precision, stage
from hpsafety.train.metrics import say
from hpsafety.train.rundir import RunDir, input_hashes, model_hashes

OUTPUTS = ("redteam.json", "dialogues.jsonl", "finds.jsonl", "replay.jsonl", "pairs.jsonl", "report.html")


def run(cfg) -> None:
    """hpsafety redteam: see RedteamConfig. Writes the files named above to cfg.out."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    judge = load_answer_judge(cfg.judge)
    sessions = read_sessions(cfg.sessions)
    rounds = read_rounds(cfg.previous)
    chain, found = chain_of(rounds), found_before_of(rounds)
    number = 1 + len(chain)
    attacks, counts = draw_attacks(cfg, number, found)
    earlier = [Path(folder) / name for folder in cfg.previous for name in FILES]
    named = {"model": cfg.model} | ({"safety_rm": cfg.safety_rm} if cfg.safety_rm else {})
    hashes = model_hashes(named)
    inputs = input_hashes([*cfg.data, *cfg.garak, *earlier, SHIPPED, AREAS]) | hashes
    # People's sessions come after the answers: they are no part of what makes a round another one.
    out = RunDir(cfg.out, "redteam", dataclasses.replace(cfg, sessions=()), inputs, world)
    if out.complete and not cfg.sessions:
        if world.is_main:
            say(f"{cfg.out}: this round is complete; nothing to do (--no-resume makes it anew)")
        return
    dtype, why = precision.choose(cfg.precision, world.device)
    cfg = dataclasses.replace(cfg, precision=precision.name(dtype))
    files = {redteam_job.ATTACKED: redteam_job.attack_rows(attacks, cfg, number)} | replay_rows(rounds)
    limit, files, dropped = check_dialogues(cfg, files, dtype)
    counts |= dropped | {"attacks": len(files[redteam_job.ATTACKED])}
    counts["earlier_violations"] = sum(map(len, files.values())) - counts["attacks"]
    headline = f"redteam: round {number}, {counts['attacks']} attacks"
    again = f", {counts['earlier_violations']} earlier violations" if rounds else ""
    stage.begin(out, f"{headline}{again}; judge {cfg.judge}; {why}", counts, world)
    jobs = out.path / "jobs"
    if world.is_main:
        prepare(out, jobs, files)
        counts["unmarked_answers"] = redteam_job.write_people(jobs, sessions)
    distributed.barrier(world)
    for name, rows in files.items():
        redteam_job.play(cfg, jobs, name, rows, limit, world)
    unmarked = [redteam_job.PEOPLE] if any(session.open for session in sessions) else []
    redteam_job.score(cfg, jobs, [*files, *unmarked], world)
    if world.is_main:
        people = gamma(sessions, redteam_job.people_judge(jobs, judge)) if sessions else None
        if people:
            people["judge"] = judge_name(cfg.judge, cfg.safety_rm) if unmarked else "the sessions' own marks"
            counts["session_files"] = input_hashes(cfg.sessions)
        notes = other_judge(rounds, hashes, cfg.judge)
        counts |= report(cfg, number, files, chain, found, people, judge, counts, notes, out.path)
    out.finish(counts, tuple(name for name in OUTPUTS if (out.path / name).exists()))
    if world.is_main:
        out.checkpoints.rmdir()  # a round has none
        say(f"redteam: wrote {out.path / 'report.html'}, redteam.json and finds.jsonl")
    distributed.barrier(world)


# ---- before anything is written ----


def draw_attacks(cfg, number: int, found: set[str]):
    """(attacks, counts): mutations of the seeds of --data, and garak's prompts."""
    rows = load_rows(cfg.data, "prompt") if cfg.data else []
    seeds, counts = sort_seeds(rows, found)
    if cfg.data and not seeds:
        raise InputError(
            f"{', '.join(cfg.data)}: no seed is left ({told(counts)}); a seed is a row with is_safety true"
        )
    ready, more = read_garak(cfg.garak)
    attacks, left_out = choose_attacks(load_templates(), seeds, ready, cfg, number, found)
    return attacks, dict(counts + more + left_out)


def told(counts: dict) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def check_dialogues(
    cfg, files: dict[str, list[dict]], dtype
) -> tuple[int, dict[str, list[dict]], dict[str, int]]:
    """(tokens a dialogue may have, the rows that fit, counts). Raises InputError for a model without chat template or
    tokenizer, a safety model that is none, and where no attack fits."""
    limit = load_reward_model(cfg.safety_rm, dtype).config.max_positions - 1 if cfg.safety_rm else None
    model = load_model(cfg.model, dtype)
    check_chat(model, cfg.model)
    context = model.config.max_positions
    limit = context if limit is None else min(context, limit)  # - 1: the end of turn that scoring puts behind
    kept, counts = {}, {}
    for name, rows in files.items():
        kept[name], lost = redteam_job.fitting(rows, model, limit, cfg)
        kind = "attacks" if name == redteam_job.ATTACKED else "earlier violations"
        if lost:
            counts[f"{kind} left out: too long"] = counts.get(f"{kind} left out: too long", 0) + lost
    if not kept[redteam_job.ATTACKED]:
        raise InputError(
            f"no attack leaves room for an answer in {limit} tokens; lower --max-new-tokens or give shorter seeds"
        )
    return limit, {name: rows for name, rows in kept.items() if rows}, counts


def prepare(out: RunDir, jobs: Path, files: dict[str, list[dict]]) -> None:
    """Writes what is to be asked; a fresh start inherits nothing."""
    if out.fresh:
        shutil.rmtree(jobs, ignore_errors=True)
        for name in OUTPUTS:
            (out.path / name).unlink(missing_ok=True)
    jobs.mkdir(exist_ok=True)
    for name, rows in files.items():
        write_records(jobs / f"{name}.jsonl", rows)


# ---- what came out ----


def report(
    cfg, number: int, files, chain, found: set[str], people, judge, counts: dict, notes: list[str], out: Path
) -> dict[str, int]:
    """All files of OUT but the manifest, and the tables on stdout, from the files of the jobs; more counts."""
    jobs, source = out / "jobs", f"redteam round {number}"
    dialogues = [dialogue_row(row) for row in redteam_job.judged(jobs, redteam_job.ATTACKED, judge)]
    replays = [
        row | {"vector": row["attack"], "turns": len(row["answers"])}
        for name in files if name != redteam_job.ATTACKED
        for row in redteam_job.judged(jobs, name, judge)
    ]  # fmt: skip
    found_now = finds(dialogues, source)
    pairs, left_out = preference_pairs(replays, source)
    remaining = [
        first_prompt_row(row) for row in dialogues if row["split"] == "redteam" and not row["violation"]
    ]
    found_now, repeated = without(found_now, remaining)
    more = left_out | {
        "violations": sum(row["violation"] for row in dialogues), "finds": len(found_now), "pairs": len(pairs),
        "finds left out: also a dialogue that violates nothing": repeated,
        "finds left out: the violation comes before the request": sum(
            row["violation"] and row["find_turn"] is None for row in dialogues
        ),
        "dialogues cut by the context": sum(row["full"] for row in dialogues),
        "earlier violations not asked to their end": sum(row["full"] for row in replays),
    }  # fmt: skip
    notes = [line for line in (*notes, finds_note(dialogues)) if line]
    name = judge_name(cfg.judge, cfg.safety_rm)
    result = result_of(cfg, number, dialogues, replays, chain, found, people, name, counts | more, notes)
    write_records(out / "dialogues.jsonl", dialogues)
    write_records(out / "finds.jsonl", found_now)
    for file, rows in (("replay.jsonl", replays), ("pairs.jsonl", pairs)):
        if rows:
            write_records(out / file, rows)
    with atomic_write(out / "redteam.json") as handle:
        json.dump(result, handle, ensure_ascii=False, indent=1, allow_nan=False)
    write_page(result, dialogues, replays, out / "report.html")
    show_tables(result)
    for line in notes:
        say(f"redteam: {line}")
    return more


def without(found: list[dict], remaining: list[dict]) -> tuple[list[dict], int]:
    """(finds that no remaining dialogue of the red-team split has as its prompt, how many have): DATA-3."""
    others = {normalise_prompt(row["prompt"]) for row in remaining}
    kept = [row for row in found if normalise_prompt(row["prompt"]) not in others]
    return kept, len(found) - len(kept)
