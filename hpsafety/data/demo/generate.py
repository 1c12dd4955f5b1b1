"""Writes the demo's data from the templates: `python -m hpsafety.data.demo.generate`, byte for byte the same.

The texts are in templates/*.toml. A training file holds tables `[kind.group.name]`, where kind.group is
category.attack for adversarial prompts, and borderline.topic or helpful.topic for the others:

    [helpful.cooking.basic]
    prompt = "How do I cook perfect {dish}?"          # skeleton: {slots} are filled
    responses = ["{answer} Taste near the end."]      # one or more; row n takes number n modulo their count
    slots = ["dish", "answer"]
    fills = [["rice", "Rinse the rice, ..."], ...]    # one row each; at most MAX_FILLS

The template id is the table's name with hyphens, helpful-cooking-basic. Each row keeps its id and its slots, so
that it can be made again from them. A held-out file holds `[set.topic]`, or `[set.category.attack]`, with lines
`name = [prompt, reference response]`: each is a template of its own, and none occurs in training (DATA-3).
How the preference pairs are made from the training prompts is told in pairs.py. dialogues.toml holds `[split]`, with
lines `name = [the user's turns]`: dialogues whose answers a model is to give.

Harmful requests are named by topic or by a placeholder such as [substance X], never described (DATA-4).
"""

import json
import random
from collections.abc import Iterator

from hpsafety.data.demo.pairs import preference_rows
from hpsafety.data.demo.texts import HERE, fill, read_toml
from hpsafety.files import atomic_write

SEED = 0  # of the order of the rows
MAX_FILLS = 10  # rows a template may give
SOURCE = "hpsafety-demo"
SAFETY_FILES = ("safety_illicit", "safety_hateful", "safety_advice")
HELPFUL_FILES = ("borderline", "helpful_a", "helpful_b")
TASK_FILES = ("borderline_tasks", "helpful_tasks")  # of these there are no preference pairs
HELDOUT_SPLITS = {
    "heldout_adversarial": "test_safety",
    "heldout_borderline": "test_borderline",
    "heldout_helpful": "test_help",
}
CHECKS = {"fits_dialogue": True, "follows_instruction": True, "well_written": True, "safe": True}


def templates(tasks: bool = True) -> dict[str, dict]:
    """Template id -> {prompt, responses, slots, fills, is_safety, is_borderline, category, attack} (training).

    tasks  with those of TASK_FILES
    """
    found = {}
    for file in (*SAFETY_FILES, *HELPFUL_FILES, *(TASK_FILES if tasks else ())):
        for kind, groups in read_toml(file).items():
            for group, tables in groups.items():
                for name, table in tables.items():
                    found[f"{kind}-{group}-{name}"] = table | row_fields(file, kind, group)
    return found


def row_fields(file: str, kind: str, group: str) -> dict:
    """What every row of a table has in common; attack is null where nothing is attacked."""
    if file in SAFETY_FILES:
        return {"is_safety": True, "is_borderline": False, "category": kind, "attack": group}
    return {"is_safety": False, "is_borderline": kind == "borderline", "category": group, "attack": None}


def template_rows(template: str, table: dict) -> Iterator[dict]:
    """The demonstrations of one template. Raises ValueError where a fill does not match the slots."""
    if len(table["fills"]) > MAX_FILLS:
        raise ValueError(f"template {template} has more than {MAX_FILLS} fills")
    for number, texts in enumerate(table["fills"]):
        slots = dict(zip(table["slots"], texts, strict=True))
        yield {
            "id": f"{template}-{number}",
            "prompt": fill(table["prompt"], slots),
            "response": fill(table["responses"][number % len(table["responses"])], slots),
            "is_safety": table["is_safety"],
            "is_borderline": table["is_borderline"],
            "category": table["category"],
            "attack": table["attack"],
            "split": "train",
            "source": SOURCE,
            "template": template,
            "slots": slots,
            "checks": CHECKS,
        }


def train_rows(tasks: bool = True) -> list[dict]:
    """All demonstrations, in an order drawn from SEED."""
    rows = [row for template, table in templates(tasks).items() for row in template_rows(template, table)]
    random.Random(SEED).shuffle(rows)
    return rows


def heldout_rows(name: str) -> list[dict]:
    """The prompts of one held-out set, each with its reference response, in the order of the file."""
    rows = []
    for group, entries in read_toml(name)[name].items():
        is_safety = name == "heldout_adversarial"
        for attack, lines in entries.items() if is_safety else [(None, entries)]:
            for entry, (prompt, response) in lines.items():
                identity = "-".join(filter(None, (name, group, attack, entry)))
                rows.append(
                    {
                        "id": identity,
                        "prompt": prompt,
                        "response": response,
                        "is_safety": is_safety,
                        "is_borderline": name == "heldout_borderline",
                        "category": group,
                        "attack": attack,
                        "split": HELDOUT_SPLITS[name],
                        "source": SOURCE,
                        "template": identity,
                    }
                )
    return rows


def dialogue_rows() -> list[dict]:
    """Prompts of several user turns without answers, in the order of the file."""
    return [
        {
            "id": f"dialogue-{name}",
            "prompt": [{"role": "user", "content": text} for text in turns],
            "split": split,
            "source": SOURCE,
        }
        for split, dialogues in read_toml("dialogues").items()
        for name, turns in dialogues.items()
    ]


def data_sets() -> dict[str, list[dict]]:
    """File stem -> rows: all files of the demo."""
    train = train_rows()
    heldout = {name: heldout_rows(name) for name in HELDOUT_SPLITS}
    others = {
        "preferences": preference_rows(train_rows(tasks=False), templates(tasks=False)),
        "dialogues": dialogue_rows(),
    }
    return {"train": train} | others | heldout


def encode(rows: list[dict]) -> bytes:
    """The rows as UTF-8 JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main() -> None:
    for name, rows in data_sets().items():
        with atomic_write(HERE / f"{name}.jsonl", "wb") as handle:
            handle.write(encode(rows))
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
