"""What a row of each kind holds: the fields, their types and what must agree (DATA-1, DATA-2)."""

import json
from collections.abc import Callable

from hpsafety.errors import InputError, file_error

CATEGORIES = ("illicit", "hateful", "advice")
ATTACKS = ("psychological", "logic", "syntactic", "semantic", "perspective", "non_english", "other")
RATINGS = ("significantly", "better", "slightly", "negligibly")
SPLITS = ("train", "rt_train", "valid", "test_help", "test_safety", "test_borderline", "redteam")
TRAIN_SPLITS = ("train", "rt_train")
ROLES = ("system", "user", "assistant")
FINISHES = ("stop", "length")
# kind: the fields every row of it must have
REQUIRED = {
    "prompt": ("prompt",),
    "demonstration": ("prompt", "response"),
    "preference": ("prompt", "chosen", "rejected"),
    "group": ("prompt", "responses"),
    "score": ("id", "safety", "helpful", "safety_logit", "helpful_logit", "combined", "best"),
    "judgement": ("prompt_id", "response_id", "rater_id", "likert"),
    "document": ("text",),
}
# (chosen_safe, rejected_safe): the bin; the missing pair is never trained on (PREF-1)
SAFETY_BINS = {(True, False): 1, (True, True): 2, (False, False): 3}


def validate(record: dict, kind: str, where: tuple) -> dict:
    """Check a row against its kind's schema (DATA-1, DATA-2) and return it; other fields are kept.

    where  (path, line or None), the start of every message
    A preference row without `safety_bin` but with `chosen_safe` and `rejected_safe` gets its bin (in place).
    Raises InputError for a missing field, a wrong type, an unknown value and fields that disagree.
    """
    required = REQUIRED[kind]
    for name in required:
        if name not in record:
            article = "an" if kind[0] in "aeiou" else "a"
            needs = f"{article} {kind} needs {', '.join(required)}"
            raise bad_row(where, f'field "{name}" is missing; {needs}')
    if "prompt" in required:
        _check_prompt(record["prompt"], where)
        _check_prompt_fields(record, where)
    _CHECKS[kind](record, where)
    return record


def bad_row(where: tuple, message: str) -> InputError:
    """FILE:LINE: message; `where` is (path, line or None)."""
    path, line = where
    return file_error(path, message, line)


def type_name(value) -> str:
    """A JSON value's type in words."""
    names = {bool: "true or false", str: "a string", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def _expect(record: dict, name: str, test: Callable, expected: str, where: tuple, optional: bool = False):
    """The field's value; an optional one may be absent or null (then None)."""
    value = record.get(name)
    if value is None and optional:
        return None
    if not test(value):
        got = (
            json.dumps(value, ensure_ascii=False)
            if isinstance(value, (str, int, float))
            else type_name(value)
        )
        got = got if len(got) <= 60 else got[:57] + "..."
        raise bad_row(where, f'field "{name}" must be {expected}, got {got}')
    return value


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_bool(value) -> bool:
    return isinstance(value, bool)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value) -> bool:
    return _is_text(value) or _is_int(value)


def _check_prompt(prompt, where: tuple) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise bad_row(where, 'field "prompt" is empty')
        return
    if not isinstance(prompt, list) or not prompt:
        expected = "a string or a list of messages [{role, content}]"
        raise bad_row(
            where, f'field "prompt" must be {expected}, got {type_name(prompt) if prompt != [] else "[]"}'
        )
    for index, message in enumerate(prompt):
        label = f"prompt[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise bad_row(where, f'field "{label}" must be an object with role and content')
        if message["role"] not in ROLES:
            role = json.dumps(message["role"], ensure_ascii=False)[:60]
            raise bad_row(
                where, f'field "{label}.role": unknown role {role}; expected one of {", ".join(ROLES)}'
            )
        if not isinstance(message["content"], str):
            raise bad_row(
                where, f'field "{label}.content" must be a string, got {type_name(message["content"])}'
            )
        if not message["content"].strip():
            raise bad_row(where, f'field "{label}.content" is empty')
    if prompt[-1]["role"] != "user":
        raise bad_row(where, f'field "prompt" must end with a user message, not {prompt[-1]["role"]}')


def _one_of(values: tuple) -> tuple[Callable, str]:
    return (lambda value: isinstance(value, str) and value in values), f"one of {', '.join(values)}"


def _check_prompt_fields(record: dict, where: tuple) -> None:
    """The optional fields every row with a prompt may have (DATA-2)."""
    _expect(record, "id", _is_id, "a string or a whole number", where, optional=True)
    for name in ("source", "risk_label"):
        _expect(record, name, _is_text, "a string", where, optional=True)
    _expect(record, "split", *_one_of(SPLITS), where, optional=True)
    is_borderline = _expect(record, "is_borderline", _is_bool, "true or false", where, optional=True)
    is_safety = _expect(record, "is_safety", _is_bool, "true or false", where, optional=True)
    if is_safety and is_borderline:
        raise bad_row(
            where, '"is_borderline" and "is_safety" cannot both be true: a borderline prompt is harmless'
        )
    _check_taxonomy(record, where)
    checks = _expect(
        record, "checks", lambda v: isinstance(v, dict), "an object of true and false", where, True
    )
    for name in checks or {}:
        _expect(checks, name, _is_bool, "true or false", where)


def _check_taxonomy(record: dict, where: tuple) -> None:
    for name, values in (("category", CATEGORIES), ("attack", ATTACKS)):
        if record.get("is_safety") is True:
            if record.get(name) is None:
                raise bad_row(
                    where,
                    f'field "{name}" is missing; a row with "is_safety": true needs {_one_of(values)[1]}',
                )
            _expect(record, name, *_one_of(values), where)
        else:
            _expect(record, name, _is_text, "a string", where, optional=True)


def _check_demonstration(record: dict, where: tuple) -> None:
    if not _expect(record, "response", _is_text, "a string", where).strip():
        raise bad_row(where, 'field "response" is empty; a demonstration needs an answer to learn from')


def _check_preference(record: dict, where: tuple) -> None:
    for name in ("chosen", "rejected"):
        _expect(record, name, _is_text, "a string", where)
    _expect(record, "rating", *_one_of(RATINGS), where, optional=True)
    for name in ("gen_a", "gen_b"):
        _expect(
            record, name, lambda v: isinstance(v, dict), "an object with model and temperature", where, True
        )
    safety_bin = _expect(record, "safety_bin", lambda v: _is_int(v) and 1 <= v <= 3, "1, 2 or 3", where, True)
    safe = [
        _expect(record, name, _is_bool, "true or false", where, True)
        for name in ("chosen_safe", "rejected_safe")
    ]
    if None in safe:
        if safe != [None, None]:
            raise bad_row(where, '"chosen_safe" and "rejected_safe" go together; give both or neither')
        return
    derived = SAFETY_BINS.get(tuple(safe))  # None: chosen unsafe, rejected safe; `admit` excludes the row
    if safety_bin is None and derived is not None:
        record["safety_bin"] = derived
    elif safety_bin is not None and safety_bin != derived:
        chosen, rejected = (json.dumps(value) for value in safe)
        should = f"make bin {derived}" if derived else "fit no bin"
        given = f"chosen_safe {chosen} and rejected_safe {rejected}"
        raise bad_row(where, f'field "safety_bin" is {safety_bin}, but {given} {should}')


def _check_group(record: dict, where: tuple) -> None:
    responses = _expect(record, "responses", _is_list_of(_is_text, 1), "a list of at least one string", where)
    samples = _expect(
        record, "samples", _is_list_of(lambda v: isinstance(v, dict), 1), "a list of objects", where, True
    )
    if samples is None:
        return
    if len(samples) != len(responses):
        raise bad_row(where, f'field "samples" has {len(samples)} entries for {len(responses)} responses')
    for sample in samples:
        _expect(sample, "text", _is_text, "a string", where)
        tokens = _expect(sample, "tokens", _is_list_of(_is_int, 1), "a list of token ids", where)
        logprobs = _expect(sample, "logprobs", _is_list_of(_is_number), "a list of numbers", where)
        _expect(sample, "finish", *_one_of(FINISHES), where)
        _expect(sample, "seed", _is_int, "a whole number", where)
        _expect(sample, "temperature", lambda v: _is_number(v) and v >= 0, "a number from 0 up", where)
        if len(tokens) != len(logprobs):
            raise bad_row(where, f'field "samples": {len(logprobs)} logprobs for {len(tokens)} tokens')


def _check_score(record: dict, where: tuple) -> None:
    _expect(record, "id", _is_id, "a string or a whole number", where, optional=True)
    in_unit = _is_list_of(lambda v: _is_number(v) and 0 <= v <= 1, 1)
    for name in ("safety", "helpful", "combined"):
        _expect(record, name, in_unit, "a list of numbers in (0, 1)", where)
    for name in ("safety_logit", "helpful_logit"):
        _expect(record, name, _is_list_of(_is_number, 1), "a list of numbers", where)
    count = len(record["safety"])
    for name in ("helpful", "combined", "safety_logit", "helpful_logit"):
        if len(record[name]) != count:
            raise bad_row(where, f'field "{name}" has {len(record[name])} numbers, "safety" has {count}')
    _expect(
        record,
        "best",
        lambda v: _is_int(v) and 0 <= v < count,
        f"a whole number from 0 to {count - 1}",
        where,
    )


def _check_judgement(record: dict, where: tuple) -> None:
    for name in ("prompt_id", "response_id", "rater_id"):
        _expect(record, name, _is_id, "a string or a whole number", where)
    _expect(record, "likert", lambda v: _is_int(v) and 1 <= v <= 5, "a whole number from 1 to 5", where)
    _check_taxonomy(record, where)


def _check_document(record: dict, where: tuple) -> None:
    _expect(record, "text", _is_text, "a string", where)
    _expect(record, "id", _is_id, "a string or a whole number", where, optional=True)


def _is_list_of(test: Callable, least: int = 0) -> Callable:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(test, value))


_CHECKS = {
    "prompt": lambda record, where: None,
    "demonstration": _check_demonstration,
    "preference": _check_preference,
    "group": _check_group,
    "score": _check_score,
    "judgement": _check_judgement,
    "document": _check_document,
}
