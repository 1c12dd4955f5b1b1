"""The files a round asks models with, and those their answers come in.

OUT/jobs/attacks.jsonl          the round's attacks as prompt records, the user's turns without answers between
    replay-N-S.jsonl            round N's violations with its settings S
    sessions.jsonl              answers of people's sessions that nobody marked
    played-*.jsonl              what came of the dialogues
    answers-*.jsonl, scores-*.jsonl   every answer behind what was said before it, and its R_s
Each is resumable by line and over ranks (train/lines.py).
"""

from collections.abc import Sequence
from pathlib import Path

from hpsafety.config import SampleConfig, ScoreConfig
from hpsafety.data.records import iter_json_lines, write_records
from hpsafety.errors import InputError
from hpsafety.rollout.engine import Engine
from hpsafety.safety.attacks import Attack
from hpsafety.safety.judges import judge_refusal
from hpsafety.safety.redteam_judge import judge_dialogue, turns_of
from hpsafety.safety.rounds import SETTINGS
from hpsafety.safety.sampling_job import engine_settings
from hpsafety.safety.scoring_job import score_file
from hpsafety.safety.talk import Played, Script
from hpsafety.safety.talk_job import check_memory, first_prompt, play_file, system_text, user_texts
from hpsafety.train import distributed

ATTACKED = "attacks"
PEOPLE = "sessions"


def sampling(cfg, rows: Path, out: Path, settings: dict) -> SampleConfig:
    """What `hpsafety sample` would be told; settings: those of the dialogues (rounds.SETTINGS)."""
    return SampleConfig(
        model=cfg.model, data=(str(rows),), out=str(out), kv_memory=cfg.kv_memory, max_batch=cfg.max_batch,
        device=cfg.device, precision=cfg.precision, **{name: settings[name] for name in SETTINGS},
    )  # fmt: skip


def attack_rows(attacks: Sequence[Attack], cfg, number: int) -> list[dict]:
    """The attacks as prompt records, with the settings they are asked with."""
    settings = {name: getattr(cfg, name) for name in SETTINGS}
    rows = []
    for draw, attack in enumerate(attacks):
        system = [{"role": "system", "content": attack.system}] if attack.system else []
        rows.append({
            "id": f"{number}-{draw:05d}", "seed_id": attack.seed_id, "is_safety": True, "split": "redteam",
            "prompt": [*system, *({"role": "user", "content": text} for text in attack.users)],
            "category": attack.category, "attack": attack.vector, "risk_label": attack.risk_label,
            "template": attack.template, "push": attack.push, "held_out": attack.held_out, "source": attack.source,
            "opening": attack.opening,            "settings": settings | {"draw": draw},
        })  # fmt: skip
    return rows


def script(row: dict) -> Script:
    """What the user says: the last turn, where it is a push, only after a refusal; nothing more after an empty answer,
    which no chat template shows."""
    users = user_texts(row["prompt"])

    def goes_on(turn: int, answers: list[str]) -> bool:
        if turn == 1:
            return True
        if not answers[-1]:
            return False
        asked = users[turn - 2]
        return not row["push"] or turn < len(users) or judge_refusal(asked, answers[-1]) == "refusal"

    return Script(users, system=system_text(row["prompt"]), goes_on=goes_on)


def keep(row: dict, played: Played) -> dict:
    """The row with `messages`, how each answer ended, and `full`: whether the context was too short for all turns."""
    said = [{"role": "system", "content": played.script.system}] if played.script.system is not None else []
    for user, answer in zip(played.script.users, played.answers, strict=False):
        said += [{"role": "user", "content": user}, {"role": "assistant", "content": answer.text}]
    rest = {k: v for k, v in row.items() if k != "prompt"}
    return rest | {
        "messages": said, "finish": [answer.finish for answer in played.answers], "full": played.full is not None,
    }  # fmt: skip


def fitting(rows: list[dict], model, limit: int, cfg) -> tuple[list[dict], int]:
    """(rows whose first turn leaves room for an answer, how many do not). Raises InputError where the chat template
    takes no such dialogue, and where --kv-memory is too small for one."""
    engines: dict[tuple, Engine] = {}
    kept = []
    for row in rows:
        settings, mine = row["settings"], script(row)
        try:
            length = first_prompt(model.tokenizer, mine)
            if length + settings["max_new_tokens"] > limit:
                continue
            key = tuple(settings[name] for name in SETTINGS)
            if key not in engines:
                job = sampling(cfg, Path("-"), Path("-"), settings)
                engines[key] = Engine(model, engine_settings(job, model))
            check_memory(engines[key], mine, limit)
        except InputError as error:
            raise InputError(f"dialogue {row['id']!r} ({row['template']}): {error}") from None
        kept.append(row)
    return kept, len(rows) - len(kept)


def play(cfg, jobs: Path, name: str, rows: Sequence[dict], limit: int, world) -> None:
    """Plays one file of rows with one setting (a collective call)."""
    job = sampling(cfg, jobs / f"{name}.jsonl", jobs / f"played-{name}.jsonl", rows[0]["settings"])
    title = "attacks" if name == ATTACKED else f"replay of round {name.split('-')[1]}"
    play_file(job, limit, script, keep, title, world, number=lambda index, row: row["settings"]["draw"])


def score(cfg, jobs: Path, names: Sequence[str], world) -> None:
    """R_s of every answer of played-NAME.jsonl (or of sessions.jsonl), where there is a safety model (a collective
    call)."""
    for name in names:
        answers = jobs / f"answers-{name}.jsonl"
        if world.is_main and name != PEOPLE:
            write_records(answers, (
                {"id": f"{row['id']}/{turn}", "prompt": prompt, "responses": [text]}
                for row in read(jobs / f"played-{name}.jsonl")
                for turn, (prompt, text) in enumerate(turns_of(row["messages"]), start=1)
            ))  # fmt: skip
        distributed.barrier(world)
        if cfg.safety_rm:
            score_file(ScoreConfig(
                safety_rm=cfg.safety_rm, helpful_rm=cfg.safety_rm, data=(str(answers),),
                out=str(jobs / f"scores-{name}.jsonl"), device=cfg.device, precision=cfg.precision,
                tokens_per_batch=cfg.tokens_per_batch, all_safety=True,
            ), world)  # fmt: skip


def read(path: Path) -> list[dict]:
    return [row for _, row in iter_json_lines(path)]


def read_scores(jobs: Path, name: str) -> list[float] | None:
    """R_s of each line of answers-NAME.jsonl; None without a safety model."""
    path = jobs / f"scores-{name}.jsonl"
    return [row["safety"][0] for row in read(path)] if path.exists() else None


def judged(jobs: Path, name: str, judge) -> list[dict]:
    """The dialogues of one job with their verdicts."""
    scores, out, at = read_scores(jobs, name), [], 0
    for row in read(jobs / f"played-{name}.jsonl"):
        count = len(turns_of(row["messages"]))
        own = [None] * count if scores is None else scores[at : at + count]
        at += count
        out.append(row | judge_dialogue(row["messages"], own, judge))
    return out


def write_people(jobs: Path, sessions) -> int:
    """Writes the answers of people's sessions that nobody marked; how many."""
    pairs = [pair for session in sessions for pair in session.open]
    if pairs:
        write_records(jobs / f"answers-{PEOPLE}.jsonl", (
            {"id": f"session/{i}", "prompt": prompt, "responses": [text]} for i, (prompt, text) in enumerate(pairs)
        ))  # fmt: skip
    return len(pairs)


def people_judge(jobs: Path, judge):
    """(prompt, answer) -> whether it violates, for the pairs in the order in which write_people took them."""
    scores = iter(read_scores(jobs, PEOPLE) or [])
    return lambda prompt, text: judge(prompt, text, 1, next(scores, None)).violation
