"""Context distillation's decisions: which samples are learnt, the log of them, and rows free of preprompt text (spec
section 7: CD-3..5).

A sample is known by (prompt id, sample index). Scores are R_s in (0, 1) of the answer to the bare prompt.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpsafety.data.chat import prompt_messages
from hpsafety.data.records import check_disjoint, normalise_prompt
from hpsafety.errors import InputError, RunError
from hpsafety.safety.preprompts import Preprompt
from hpsafety.safety.scoring_job import is_safety
from hpsafety.train.finetune import encode

RUN_WORDS = 8  # so many words of a preprompt in a row are its text; a shorter one counts whole
EMPTY, LEAKED = "empty answer", "repeats the preprompt"
ANSWERS = ("response", "responses", "samples")  # a file of groups or demonstrations is a file of prompts too
HELD_OUT = ("valid", "test_safety", "test_borderline", "test_help")


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer; score: R_s of it as an answer to the bare prompt."""

    text: str
    finish: str
    tokens: int
    seed: int
    temperature: float
    score: float


# ---- which prompts ----


def sort_rows(rows: Sequence[dict], all_safety: bool) -> tuple[list[dict], dict[str, list[dict]], dict]:
    """(adversarial prompts to distill, held-out prompts by set, counts); every row gets an id, and loses answers it
    may bring.

    Never on helpful prompts (CD-3): a row that is not marked is_safety is left out and counted, and so is one whose
    prompt another row calls helpful. all_safety takes rows that say neither as adversarial.
    Raises InputError when two prompts share an id, when one is also held out (DATA-3), and when nothing is left.
    """
    rows = [
        {"id": f"row-{i}"} | {k: v for k, v in row.items() if k not in ANSWERS and (k, v) != ("id", None)}
        for i, row in enumerate(rows, start=1)
    ]
    ours = [row for row in rows if row.get("split") in (None, "train", "rt_train")]
    held = {name: [] for name in ("adversarial", "borderline", "helpful")}
    for row in rows:
        if row.get("split") in HELD_OUT:
            held[_set_of(row, all_safety)].append(row)
    marked = [row for row in ours if _set_of(row, all_safety) == "adversarial"]
    helpful = {normalise_prompt(row["prompt"]) for row in rows if row.get("is_safety") is False}
    unique = {normalise_prompt(row["prompt"]): row for row in reversed(marked)}
    kept = [
        row
        for row in marked
        if unique[name := normalise_prompt(row["prompt"])] is row and name not in helpful
    ]
    counts = {
        "train_prompts": len(kept), "excluded_not_safety": len(ours) - len(marked),
        "excluded_called_helpful_elsewhere": len(unique.keys() & helpful),
        "repeated_prompts": len(marked) - len(unique), "held_out": sum(map(len, held.values())),
        "other_splits": len(rows) - len(ours) - sum(map(len, held.values())),
    }  # fmt: skip
    if not kept:
        raise InputError(
            f"no adversarial prompt is left: of {len(ours)} rows to train on {counts['excluded_not_safety']} are not "
            "marked is_safety (distillation is never done on helpful prompts; --all-safety takes rows without the "
            "mark), and the others are repeated or called helpful elsewhere"
        )
    repeated = [name for name, count in Counter(row["id"] for row in kept).items() if count > 1]
    if repeated:
        raise InputError(
            f"the id {repeated[0]!r} stands on two prompts; the decision log needs ids that differ"
        )
    check_disjoint(kept, [row for part in held.values() for row in part])
    return kept, held, counts


def _set_of(row: dict, all_safety: bool) -> str:
    if row.get("is_borderline") or row.get("split") == "test_borderline":
        return "borderline"
    if row.get("split") == "test_help":
        return "helpful"
    return "adversarial" if is_safety(row, all_safety) else "helpful"


# ---- which samples ----


def decide(
    id, index: int, plain: Answer, sample: Answer, preprompt_id: str, leaked: bool, select: str
) -> dict:
    """One line of decisions.jsonl. The rule is strict: of equal scores the sample is not kept (CD-5).

    leaked  whether the sample repeats its preprompt (`leaks`). Such a sample, and a blank one, is never kept:
            `excluded` says why
    """
    why = EMPTY if not sample.text.strip() else LEAKED if leaked else None
    line = {
        "id": id, "sample_index": index, "score_plain": plain.score, "score_preprompt": sample.score,
        "preprompt_id": preprompt_id, "select": select, "excluded": why,
    }  # fmt: skip
    return line | {"kept": kept_by_rule(line)}


def kept_by_rule(line: dict) -> bool:
    """The decision of one line from its scores, its select and its excluded, without a look at `kept`."""
    better = line["select"] == "all" or line["score_preprompt"] > line["score_plain"]
    return better and line["excluded"] is None


def replay(lines: Iterable[dict]) -> list[tuple]:
    """(id, sample index) of every row of train.jsonl, in its order, from decisions.jsonl's other fields (CD-5)."""
    return [(line["id"], line["sample_index"]) for line in lines if kept_by_rule(line)]


def training_row(row: dict, index: int, sample: Answer) -> dict:
    """The bare prompt with the sample: a demonstration that knows nothing of the preprompt (CD-4)."""
    return row | {
        "response": sample.text, "sample_index": index, "r_s": sample.score, "seed": sample.seed,
        "temperature": sample.temperature, "finish": sample.finish,
    }  # fmt: skip


# ---- no preprompt in what is learnt ----


def check_free(rows: Iterable[dict], preprompts: dict, tokenizer) -> None:
    """CD-4, as rows are written: RunError where a row holds a stretch of its preprompt.

    preprompts  prompt id -> Preprompt or None
    """
    for row in rows:
        preprompt = preprompts[row["id"]]
        if leaks(row, preprompt, tokenizer):
            raise RunError(f"training row {row['id']!r} holds text of its preprompt {preprompt.id} (CD-4)")


def leaks(row: dict, preprompt: Preprompt | None, tokenizer) -> bool:
    """Whether a training row, prompt or response, holds RUN_WORDS words in a row of its preprompt, whatever case, space
    and punctuation, or as many of its tokens in a row as so many of its words have on average."""
    if preprompt is None:
        return False
    words, tokens = _words(preprompt.text), tokenizer.encode_plain(preprompt.text)
    text = "\n".join([*(message["content"] for message in prompt_messages(row["prompt"])), row["response"]])
    group = encode(tokenizer, row, "last")
    trained = [*group.prompt, *(token for response in group.responses for token in response)]
    run = math.ceil(RUN_WORDS * len(tokens) / max(1, len(words)))
    return holds_run(words, _words(text), RUN_WORDS) or holds_run(tokens, trained, run)


def holds_run(needle: Sequence, hay: Sequence, length: int) -> bool:
    """Whether any `length` items in a row of `needle`, or all of a shorter one, stand in a row in `hay`."""
    length = min(length, len(needle))
    runs = {tuple(needle[i : i + length]) for i in range(len(needle) - length + 1)}
    return length > 0 and any(tuple(hay[i : i + length]) in runs for i in range(len(hay) - length + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
