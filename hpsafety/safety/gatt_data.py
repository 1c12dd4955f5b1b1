"""Ghost attention's data: dialogues of user turns, with the instruction in all of them for sampling, in the first only
for training (spec section 6, GATT-1, GATT-2)."""

from collections import Counter

import numpy as np

from hpsafety.data.batches import nested_subset
from hpsafety.data.records import TRAIN_SPLITS
from hpsafety.errors import InputError
from hpsafety.safety.gatt_instructions import Instruction, attach
from hpsafety.safety.recall import holds
from hpsafety.safety.talk import Played, Script
from hpsafety.safety.talk_job import system_text, user_texts

OPENING = 5  # words
HELD_SHARE = 0.1  # of the rows, whose questions the evaluation asks, where none is marked valid


def split_rows(rows: list[dict], seed: int) -> tuple[list[dict], list[str], dict]:
    """(rows to train on, questions of the evaluation, counts).

    The questions are the user turns of rows with split valid, or of a seeded tenth where there are none; one that is
    also trained on is left out.
    """
    usable = [row for row in rows if row.get("split") in (None, *TRAIN_SPLITS, "valid")]
    held = [row for row in usable if row.get("split") == "valid"]
    train = [row for row in usable if row.get("split") != "valid"]
    if not held and len(train) > 1:
        taken = set(nested_subset(len(train), HELD_SHARE, seed).tolist()) or {0}
        held = [row for i, row in enumerate(train) if i in taken]
        train = [row for i, row in enumerate(train) if i not in taken]
    trained = {_plain(text) for row in train for text in user_texts(row["prompt"])}
    every = {_plain(text): text for row in held for text in user_texts(row["prompt"])}
    questions = [text for key, text in every.items() if key not in trained]
    if not train or not questions:
        raise InputError(
            "ghost attention needs dialogues to train on and others to ask: all are held out, or all held-out "
            "questions are also trained on; see split"
        )
    counts = {
        "other_splits": len(rows) - len(usable),
        "held_rows": len(held),
        "held_questions": len(questions),
    }
    return train, questions, counts | {"held_questions_also_trained": len(every) - len(questions)}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def make_dialogues(rows: list[dict], turns: int, most: int | None, seed: int) -> tuple[list[dict], dict]:
    """(dialogues {id, prompt: [system message,] user messages}, counts); `most` of them where given, a seeded choice.

    Rows of a single turn are joined, `turns` to a dialogue, in the order of the file; what is left over at the end is
    left out. A row of several turns is a dialogue, with its own system message if it has one.
    """
    whole, single = [], []
    for number, row in enumerate(rows):
        users = user_texts(row["prompt"])
        (whole if len(users) > 1 or turns == 1 else single).append(
            (row.get("id", f"row-{number}"), row, users)
        )
    dialogues = [_dialogue(name, users, system_text(row["prompt"])) for name, row, users in whole]
    for start in range(0, len(single) - turns + 1, turns):
        part = single[start : start + turns]
        dialogues.append(_dialogue(f"{part[0][0]}+{turns - 1}", [users[0] for _, _, users in part], None))
    if not dialogues:
        raise InputError(
            f"no dialogue can be made: {len(single)} rows of one turn each, --turns {turns}; lower --turns"
        )
    found = len(dialogues)
    if most is not None and most < found:
        chosen = np.sort(np.random.default_rng([seed, found]).permutation(found)[:most])
        dialogues = [dialogues[i] for i in chosen]
    joined = len(single) // turns
    counts = {
        "dialogues": len(dialogues),
        "dialogues_not_used": found - len(dialogues),
        "joined_dialogues": joined,
    }
    return dialogues, counts | {"single_rows_left_over": len(single) - joined * turns}


def _dialogue(name, users: list[str], system: str | None) -> dict:
    head = [] if system is None else [{"role": "system", "content": system}]
    return {"id": name, "prompt": head + [{"role": "user", "content": text} for text in users]}


def with_instruction(dialogue: dict, instruction: Instruction) -> dict:
    """The row of instructions.jsonl: the dialogue, its instruction and the values in it."""
    return dialogue | {
        "instruction": instruction.text,
        "values": instruction.values,
        "terse": instruction.terse,
    }


def sampling_script(row: dict, k: int = 1) -> Script:
    """The instruction in every user turn (GATT-1); k samples of the last answer."""
    users = [attach(row["instruction"], text) for text in user_texts(row["prompt"])]
    return Script(users, system=system_text(row["prompt"]), k=k)


def misfit(row: dict, earlier: list[str], text: str, rules: bool) -> str | None:
    """Why a last answer is not trained on, or None.

    rules  also what a rule can see: a language that is not the one asked for, and an answer that begins as an earlier
           one did. A small model gives both, and would learn to give them.
    """
    if not all([*earlier, text]):
        return "an empty answer"
    repeated = _plain(row["instruction"])
    if any(repeated in _plain(t) for t in [*earlier, text]):  # it would be in the row a second time (GATT-1)
        return "an answer repeats the instruction"
    language = row["values"].get("language")
    if rules and language is not None and not holds("language", language, text):
        return "the last answer is in another language"
    if rules and _plain(text).split()[:OPENING] in [_plain(t).split()[:OPENING] for t in earlier]:
        return "the last answer begins as an earlier one"
    return None


def keep_dialogue(row: dict, played: Played, rules: bool) -> dict:
    """The row of dialogues.jsonl: the chat as it was sampled, `prompt` up to the last user turn, all `samples` of the
    last answer and as `response` the first of them that fits; or why the dialogue was `dropped`."""
    if played.full is not None:
        return row | {"dropped": "longer than the context"}
    earlier = played.texts()[:-1]
    why = [misfit(row, earlier, sample.text, rules) for sample in played.samples]
    out = row | {
        "prompt": played.script.messages(earlier, played.script.users[-1]),
        "samples": [
            {"text": a.text, "finish": a.finish, "misfit": w}
            for a, w in zip(played.samples, why, strict=True)
        ],
    }
    if None not in why:
        return out | {"prompt": row["prompt"], "said": earlier, "dropped": why[0]}
    chosen = why.index(None)
    answer = played.samples[chosen]
    return out | {"response": answer.text, "finish": answer.finish, "sample_index": chosen}


def training_row(plain: dict, sampled: dict) -> dict:
    """The dialogue with the instruction in the first user turn only (GATT-1); its response is the last answer, which
    alone is trained on (GATT-2).

    plain, sampled  lines of instructions.jsonl and dialogues.jsonl
    """
    users = iter(user_texts(plain["prompt"]))
    messages, first = [], True
    for message in sampled["prompt"]:
        if message["role"] != "user":
            messages.append(message)
            continue
        text = next(users)
        messages.append({"role": "user", "content": attach(plain["instruction"], text) if first else text})
        first = False
    return {name: value for name, value in sampled.items() if name != "samples"} | {"prompt": messages}


def dropped(rows: list[dict]) -> Counter:
    """How many dialogues were dropped, by reason."""
    return Counter(row["dropped"] for row in rows if "dropped" in row)
