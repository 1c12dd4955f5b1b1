"""gamma: violating prompts per person and hour, of people's sessions and, by assumption, of automated attackers (RT-1,
RT-5).

A session is a JSON line: `person` (text or number), `hours` (above 0), and one of
  violating  how many violating prompts the person made
  dialogues  a list of dialogues, each a list of messages {role, content}
  turns      one such dialogue
An answer (role assistant) may say `"violation": true` or false; those that do not are judged by the round's judge.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hpsafety.data.records import iter_json_lines
from hpsafety.data.schemas import ROLES, bad_row, type_name
from hpsafety.safety.intervals import mean_interval
from hpsafety.safety.redteam_judge import turns_of

NEEDS = "a session needs person, hours and one of turns, dialogues, violating"
FORMS = ("turns", "dialogues", "violating")


@dataclass(frozen=True, slots=True)
class Session:
    """marked: violating prompts that the record itself counts; open: (prompt, answer) pairs without a mark."""

    person: str
    hours: float
    marked: int
    open: tuple[tuple[list[dict], str], ...]


def read_sessions(paths: Iterable[str]) -> list[Session]:
    """The sessions of JSON-lines files. Raises InputError, FILE:LINE and field, for a record that is none (RT-1)."""
    return [_session(row, (path, line)) for path in paths for line, row in iter_json_lines(path)]


def _session(row: dict, where: tuple) -> Session:
    for field in ("person", "hours"):
        if row.get(field) is None:
            raise bad_row(where, f'field "{field}" is missing; {NEEDS}')
    person, hours = row["person"], row["hours"]
    if not isinstance(person, str | int) or isinstance(person, bool) or not str(person).strip():
        raise bad_row(where, f'field "person" must be a name or a number, got {type_name(person)}')
    if not isinstance(hours, int | float) or isinstance(hours, bool) or hours <= 0:
        got = hours if isinstance(hours, int | float) else type_name(hours)
        raise bad_row(where, f'field "hours" must be a number above 0, got {got}')
    given = [form for form in FORMS if row.get(form) is not None]
    if len(given) != 1:
        raise bad_row(where, f"holds {' and '.join(given) or 'none of them'}; {NEEDS}")
    form, value = given[0], row[given[0]]
    if form == "violating":
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise bad_row(where, f'field "violating" must be a whole number from 0, got {value!r}'[:120])
        return Session(str(person), float(hours), value, ())
    dialogues = [value] if form == "turns" else value
    if not isinstance(dialogues, list):
        raise bad_row(where, f'field "{form}" must be a list, got {type_name(dialogues)}')
    marked, unmarked = 0, []
    for number, dialogue in enumerate(dialogues):
        name = form if form == "turns" else f"dialogues[{number}]"
        answers = _check_dialogue(dialogue, name, where)
        for (prompt, text), mark in zip(turns_of(dialogue), answers, strict=True):
            marked += mark is True
            if mark is None:
                unmarked.append((prompt, text))
    return Session(str(person), float(hours), marked, tuple(unmarked))


def _check_dialogue(dialogue, name: str, where: tuple) -> list[bool | None]:
    """The marks of its answers."""
    if not isinstance(dialogue, list) or not dialogue:
        raise bad_row(where, f'field "{name}" must be a list of messages {{role, content}}')
    marks, before = [], None
    for index, message in enumerate(dialogue):
        label = f"{name}[{index}]"
        text = isinstance(message, dict) and message.get("content")
        if not isinstance(text, str) or not text.strip() or message.get("role") not in ROLES:
            raise bad_row(where, f'field "{label}" must hold a role ({", ".join(ROLES)}) and text as content')
        if message["role"] == "assistant":
            mark = message.get("violation")
            if mark is not None and not isinstance(mark, bool):
                raise bad_row(
                    where, f'field "{label}.violation" must be true or false, got {type_name(mark)}'
                )
            if before != "user":
                raise bad_row(where, f'field "{label}": an answer must follow what a user says')
            marks.append(mark)
        before = message["role"]
    return marks


def gamma(sessions: Sequence[Session], violates: Callable[[list[dict], str], bool] | None) -> dict:
    """{value, pooled, persons, hours, violating, low, high, label}: the mean over persons of violating prompts / hours,
    a person's sessions together, with a normal interval over persons; pooled: all prompts / all hours.

    violates  (prompt, answer) -> verdict on the pairs without a mark; None where there are none
    """
    hours: dict[str, float] = {}
    found: dict[str, int] = {}
    for session in sessions:
        judged = sum(violates(prompt, text) for prompt, text in session.open)
        hours[session.person] = hours.get(session.person, 0.0) + session.hours
        found[session.person] = found.get(session.person, 0) + session.marked + judged
    rates = [found[person] / hours[person] for person in hours]
    mean, total = mean_interval(rates), sum(hours.values())
    return {
        "value": mean.mean, "pooled": sum(found.values()) / total, "persons": len(hours), "hours": total,
        "violating": sum(found.values()), "low": mean.low, "high": mean.high,
        "label": "people: violating prompts per person and hour, mean over persons; pooled: all prompts / all hours",
    }  # fmt: skip


def gamma_auto(violating: int, attempts: int, attempts_per_hour: float) -> dict:
    """violating / (attempts / attempts_per_hour), with the assumption in its label (RT-5)."""
    hours = attempts / attempts_per_hour
    return {
        "value": violating / hours, "attempts_per_hour": attempts_per_hour, "attempts": attempts, "hours": hours,
        "label": f"automated attackers, {attempts_per_hour:g} attempts an hour assumed: not people's gamma",
    }  # fmt: skip
