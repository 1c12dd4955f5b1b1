"""Ghost attention's evaluation: is the first turn's instruction still followed at turn 2, 4, 6 and later? (GATT-5)

A dialogue has one instruction, in its first turn, and goes through held-out questions. Hobbies and figures show only
when they are asked for, so at each probed turn a question aside is put in place of the turn's own; it and its answer
are not part of what follows, so that no probe reminds the model of anything. Languages and openings are read off the
dialogue's own answers. The control is the same question as a first turn without any instruction.
"""

import numpy as np

from hpsafety.safety.gatt_instructions import FAMILIES, UNSEEN, attach, write
from hpsafety.safety.intervals import wilson
from hpsafety.safety.recall import holds
from hpsafety.safety.talk import Played, Script
from hpsafety.safety.talk_job import user_texts

PROBES = {
    "hobby": ("What do you like to do in your free time?", "What is your favourite hobby?"),
    "figure": ("Who are you? Tell me your name.", "What is your name?"),
}


def probe_rows(
    lists: dict[str, list[str]], questions: list[str], turns: tuple[int, ...], count: int, seed: int
) -> list[dict]:
    """The rows of probes.jsonl: `count` dialogues and as many controls for each family and each unseen constraint.

    lists      family -> its values
    questions  held-out user turns, each asked once in a dialogue, so that a dialogue has at most as many turns
    turns      that are probed; every second dialogue has the terse form of its instruction
    """
    rng, out = np.random.default_rng([seed, count, len(questions)]), []
    values = {family: list(lists[family]) for family in FAMILIES} | {
        name: list(v) for name, (_, v) in UNSEEN.items()
    }
    for family, choices in values.items():
        shift = int(rng.integers(len(choices)))
        for i in range(count):
            value, order = choices[(shift + i) % len(choices)], rng.permutation(len(questions))
            asked = PROBES[family][i % 2] if family in PROBES else None
            length = min(len(questions), max(turns) - (asked is not None))
            users = [questions[k] for k in order[:length]]
            out += _pair(f"{family}-{i}", family, value, i % 2 == 1, users, asked, turns)
    return out


def _pair(name, family, value, terse, users, asked, turns) -> list[dict]:
    """A dialogue with its instruction and its control."""
    trained = family in FAMILIES
    text = write({family: value}, terse) if trained else UNSEEN[family][0].format(value=value)
    shared = {"family": family, "value": value, "trained": trained}
    aside = (
        {}
        if asked is None
        else {str(t): attach(text, asked) if t == 1 else asked for t in sorted(set(turns))}
    )
    said = [attach(text, users[0]), *users[1:]] if users else [attach(text, asked)]
    rows = [{"id": name, "prompt": said, "instruction": text, "asked": aside, "control": False, **shared}]
    first = asked if asked is not None else users[0]
    rows.append({"id": f"{name}-control", "prompt": [first], "asked": {}, "control": True, **shared})
    return [row | {"prompt": [{"role": "user", "content": t} for t in row["prompt"]]} for row in rows]


def probe_script(row: dict) -> Script:
    return Script(user_texts(row["prompt"]), {int(turn): text for turn, text in row["asked"].items()})


def keep_probe(row: dict, played: Played) -> dict:
    """The row of recall-NAME.jsonl: the dialogue as it went, and each turn's answer that counts, with the verdict."""
    counted = played.asked if row["asked"] else dict(enumerate(played.answers, start=1))
    answers = {
        str(turn): {"text": a.text, "finish": a.finish, "holds": holds(row["family"], row["value"], a.text)}
        for turn, a in sorted(counted.items())
    }
    said = [a.text for a in played.answers]
    return row | {"said": said, "answers": answers, "full": played.full}


def summarise(rows: list[dict], turns: tuple[int, ...]) -> dict[str, dict]:
    """family -> {trained, control: rate, turns: {turn: rate}}.

    A rate has count, total, value, low, high (95 % Wilson) and `unreachable`: dialogues that did not get there. Where
    none did, value, low and high are None: neither 0 nor 1.
    """
    out: dict[str, dict] = {}
    for row in rows:
        out.setdefault(row["family"], {"trained": row["trained"]})
    for family, part in out.items():
        mine = [row for row in rows if row["family"] == family]
        control = [row for row in mine if row["control"]]
        probed = [row for row in mine if not row["control"]]
        part["control"] = _rate([row["answers"].get("1") for row in control])
        part["turns"] = {
            str(t): _rate([row["answers"].get(str(t)) for row in probed]) for t in sorted(set(turns))
        }
    return out


def _rate(answers: list[dict | None]) -> dict:
    reached = [answer["holds"] for answer in answers if answer is not None]
    rate = wilson(sum(reached), len(reached))
    numbers = {name: getattr(rate, name) if reached else None for name in ("value", "low", "high")}
    return {"count": rate.count, "total": rate.total, **numbers, "unreachable": len(answers) - len(reached)}


def adherence(rows: list[dict]) -> dict[str, dict]:
    """family -> rate at which the samples of last answers show the attribute they were asked for, instruction in every
    turn. Hobby and figure need not show in an answer; a language must."""
    return {
        family: _rate([
            {"holds": holds(family, row["values"][family], sample["text"])} for row in part for sample in row["samples"]
        ])
        for family in FAMILIES
        if (part := [row for row in rows if family in row["values"] and "samples" in row])
    }  # fmt: skip
