"""Earlier red-team rounds: their chain of figures, their finds, and their violations as they are asked again (RT-2).

A replay asks the stored user turns in their order, with the stored decoding settings and the same key for every draw:
the model that violated would answer the same again, as far as products do not depend on the batch. Of a dialogue of
several turns the new model's own answers stand in between.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpsafety.data.records import iter_json_lines
from hpsafety.data.schemas import ATTACKS, CATEGORIES, bad_row
from hpsafety.errors import InputError, file_error
from hpsafety.safety.attacks import identity
from hpsafety.safety.talk_job import system_text, user_texts
from hpsafety.train.rundir import sha256

FILES = ("redteam.json", "dialogues.jsonl")
SETTINGS = (
    "temperature",
    "top_p",
    "seed",
    "max_new_tokens",
)  # of a dialogue; `draw` is its number in its round


@dataclass(frozen=True)
class Round:
    """One earlier round: its folder, redteam.json, violating dialogues, and its judge's files by sha256."""

    path: Path
    result: dict
    violating: list[dict]
    judge_hashes: dict[str, str]

    @property
    def number(self) -> int:
        return self.result["round"]


def read_rounds(paths: Sequence[str]) -> list[Round]:
    """The rounds of --previous. Raises InputError for a folder without a finished round, for outputs that were changed
    since (DATA-5), and for rounds that are of different chains."""
    rounds = [_read(Path(path)) for path in paths]
    numbers = [one.number for one in rounds]
    for one in rounds:
        if numbers.count(one.number) > 1:
            raise file_error(
                one.path, f"--previous names two rounds {one.number}; a chain has one of each number"
            )
    chain_of(rounds)
    return sorted(rounds, key=lambda one: one.number)


def _read(path: Path) -> Round:
    manifest = _json(path / "manifest.json")
    if manifest.get("stage") != "redteam" or not manifest.get("ended"):
        raise file_error(
            path, "holds no finished red-team round; --previous takes what hpsafety redteam wrote"
        )
    for name in FILES:
        if not (path / name).is_file() or manifest.get("output_hashes", {}).get(name) != sha256(path / name):
            raise file_error(
                path / name, "is not what its round wrote (manifest.json has its hash); restore the file"
            )
    result = _json(path / "redteam.json")
    rows = [
        _dialogue(row, (path / "dialogues.jsonl", line))
        for line, row in iter_json_lines(path / "dialogues.jsonl")
    ]
    hashes = {k: v for k, v in manifest["input_hashes"].items() if k.startswith("safety_rm")}
    hashes["judge"] = manifest["config"]["judge"]
    return Round(path, result, [row for row in rows if row["violation"]], hashes)


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise file_error(
            path, "no such file; --previous takes a directory that hpsafety redteam wrote"
        ) from None
    except (ValueError, OSError) as error:
        raise file_error(path, f"cannot be read: {error}") from None


def _dialogue(row: dict, where: tuple) -> dict:
    """The row, which holds what a replay needs."""
    checks = {
        "messages": isinstance(row.get("messages"), list) and bool(row["messages"]),
        "violation": isinstance(row.get("violation"), bool),
        "settings": isinstance(row.get("settings"), dict) and {*SETTINGS, "draw"} <= row["settings"].keys(),
        "vector": row.get("vector") in ATTACKS,
        "category": row.get("category") in CATEGORIES,
        "opening": isinstance(row.get("opening"), int),
        "find_turn": row.get("find_turn") is None or isinstance(row["find_turn"], int),
    }
    for field, fine in checks.items():
        if not fine:
            raise bad_row(
                where, f'field "{field}" is missing or wrong; expected a dialogue of hpsafety redteam'
            )
    return row


def chain_of(rounds: Sequence[Round]) -> list[dict]:
    """The figures of all rounds before this one, in order. Raises InputError where two rounds tell them otherwise."""
    chain: dict[int, dict] = {}
    for one in rounds:
        for entry in one.result["rounds"]:
            if chain.setdefault(entry["round"], entry) != entry:
                raise file_error(
                    one.path,
                    f"tells another round {entry['round']} than the others of --previous; give one chain",
                )
    return [chain[number] for number in sorted(chain)]


def found_before_of(rounds: Sequence[Round]) -> set[str]:
    """Identities of everything that these rounds, and those before them, found: training data by now (DATA-3)."""
    return {name for one in rounds for name in one.result["found"]}


def replay_rows(rounds: Sequence[Round]) -> dict[str, list[dict]]:
    """Name of a job -> its rows: the earlier violations with one round's settings. A dialogue that several rounds hold
    is asked once, as in the first of them."""
    jobs: dict[tuple, list[dict]] = {}
    seen = set()
    for one in rounds:
        for row in one.violating:
            users = user_texts(row["messages"])
            mine = identity(users)
            if mine in seen:
                continue
            seen.add(mine)
            settings = row["settings"]
            system = system_text(row["messages"])
            prompt = [{"role": "system", "content": system}] if system else []
            jobs.setdefault((one.number, *(settings[name] for name in SETTINGS)), []).append({
                "id": f"round-{one.number}/{row['id']}", "seed_id": row["seed_id"], "is_safety": True,
                "prompt": [*prompt, *({"role": "user", "content": text} for text in users)],
                "category": row["category"], "attack": row["vector"], "risk_label": row["risk_label"],
                "template": row["template"], "push": False, "held_out": row["held_out"], "opening": row["opening"],
                "settings": settings,
                "before": {key: row[key] for key in ("messages", "degree", "find_turn", "safety_score")},
            })  # fmt: skip
    names: dict[str, list[dict]] = {}
    for (number, *_), rows in jobs.items():
        names[f"replay-{number}-{sum(name.startswith(f'replay-{number}-') for name in names)}"] = rows
    return names


def other_judge(rounds: Sequence[Round], hashes: dict[str, str], judge: str) -> list[str]:
    """A line for each earlier round whose judge was another one: its violations were found by other eyes."""
    mine = {k: v for k, v in hashes.items() if k.startswith("safety_rm")} | {"judge": judge}
    return [
        f"Round {one.number} was judged by another judge or safety model: its violations are compared with care."
        for one in rounds
        if one.judge_hashes != mine
    ]


def preference_pairs(replays: Sequence[dict], source: str) -> tuple[list[dict], dict[str, int]]:
    """(preference records of what is mitigated now, counts): chosen the new answer, rejected the violating one.

    Only where both answers have the same words before them: of a dialogue of several turns the model's own answers
    differ as a rule. Test prompts (held_out) and empty answers give no pair.
    """
    pairs: list[dict] = []
    counts: Counter = Counter()
    for row in replays:
        if row["violation"] or row["full"]:
            continue
        before, new = row["before"], row["messages"]
        old = before["messages"]
        at = None if before["find_turn"] is None else _answer_place(old, before["find_turn"])
        if row["held_out"]:
            counts["pairs left out: the seed is a test prompt"] += 1
        elif at is None:
            counts["pairs left out: the violation came before the request"] += 1
        elif new[:at] != old[:at] or len(new) <= at:
            counts["pairs left out: other words before the answer"] += 1
        elif not new[at]["content"].strip():
            counts["pairs left out: empty answer"] += 1
        else:
            pairs.append({
                "id": row["id"], "prompt": old[:at], "chosen": new[at]["content"], "rejected": old[at]["content"],
                "chosen_safe": True, "rejected_safe": False, "safety_bin": 1, "is_safety": True,
                "category": row["category"], "attack": row["vector"], "risk_label": row["risk_label"],
                "split": "rt_train", "source": source,
            })  # fmt: skip
    return pairs, dict(counts)


def _answer_place(messages: Sequence[dict], turn: int) -> int:
    """Where the answer of a turn stands."""
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not 1 <= turn <= len(places):
        raise InputError(f"a stored dialogue has no answer number {turn}")
    return places[turn - 1]
