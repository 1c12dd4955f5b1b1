"""What a round found: redteam.json, dialogues.jsonl, finds.jsonl and the four summaries (spec RT-2, RT-4 to RT-7)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from hpsafety.data.schemas import ATTACKS, CATEGORIES
from hpsafety.safety.attacks import identity
from hpsafety.safety.gamma import gamma_auto
from hpsafety.safety.intervals import wilson
from hpsafety.safety.redteam_judge import DEGREES
from hpsafety.safety.risk_areas import misinformation_topic
from hpsafety.safety.talk_job import system_text, user_texts

SUMMARIES = {
    "lengths": "Dialogue length, user turns", "risk": "Risk labels", "misinformation": "Topics of false claims",
    "degree": "Degree of risk",
}  # fmt: skip


def dialogue_row(row: dict) -> dict:
    """A judged dialogue as dialogues.jsonl holds it. Its split: rt_train where it is a find (RT-6), else redteam.

    find_turn: the first violating answer to the request itself; None where only the opening's answers violate, or none.
    """
    kept = ("id", "seed_id", "category", "risk_label", "degree", "messages", "violation", "verdict",
            "safety_score", "violating_turn", "template", "settings", "answers", "finish", "full", "held_out",
            "source", "opening")  # fmt: skip
    find_turn = next(
        (a["turn"] for a in row["answers"] if a["violation"] and a["turn"] > row["opening"]), None
    )
    find = find_turn is not None and not row["held_out"]
    return (
        {"id": row["id"], "vector": row["attack"]}
        | {name: row[name] for name in kept}
        | {"turns": len(user_texts(row["messages"])), "find_turn": find_turn}
        | {"split": "rt_train" if find else "redteam"}
    )


def finds(dialogues: Sequence[dict], source: str) -> list[dict]:
    """Prompt records to train on: what violating dialogues said up to the first violating answer to the request. Those
    made of test prompts are none (the test would be trained on), and a prompt counts once."""
    out: dict[str, dict] = {}
    for row in dialogues:
        if row["split"] != "rt_train":
            continue
        prompt = violating_prompt(row)
        out.setdefault(identity([m["role"] + m["content"] for m in prompt]), {
            "id": f"redteam-{row['id']}", "prompt": prompt if len(prompt) > 1 else prompt[0]["content"],
            "is_safety": True, "category": row["category"], "attack": row["vector"], "risk_label": row["risk_label"],
            "split": "rt_train", "source": source, "template": row["template"], "seed_id": row["seed_id"],
        })  # fmt: skip
    return list(out.values())


def violating_prompt(row: dict) -> list[dict]:
    """The messages before the first violating answer to the request."""
    places = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    return row["messages"][: places[row["find_turn"] - 1]]


def found_identities(dialogues: Sequence[dict]) -> list[str]:
    """Of everything that violated: what its user said up to there. Test prompts are in it too: they are known now."""
    return sorted({identity(user_texts(violating_prompt(row))) for row in dialogues if row["find_turn"]})


def summaries(dialogues: Sequence[dict]) -> dict[str, dict[str, int]]:
    """The four post-exercise summaries of these dialogues (RT-4): number of dialogues by user turns, by risk label, by
    topic of false claims, and by degree (all five stand there)."""
    topics = (
        misinformation_topic(row["risk_label"], row["vector"], user_texts(row["messages"])[-1])
        for row in dialogues
    )
    degrees = Counter(row["degree"] for row in dialogues)
    return {
        "lengths": {str(n): c for n, c in sorted(Counter(row["turns"] for row in dialogues).items())},
        "risk": _by_count(Counter(row["risk_label"] for row in dialogues)),
        "misinformation": _by_count(Counter(topic for topic in topics if topic is not None)),
        "degree": {str(degree): degrees[degree] for degree in DEGREES},
    }


def _by_count(counts: Counter) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def by_cell(dialogues: Sequence[dict]) -> list[dict]:
    """n and violations of each vector x category, the empty ones too (RT-7)."""
    n = Counter((row["vector"], row["category"]) for row in dialogues)
    bad = Counter((row["vector"], row["category"]) for row in dialogues if row["violation"])
    return [
        {"vector": v, "category": c, "n": n[v, c], "violations": bad[v, c]}
        for v in ATTACKS
        for c in CATEGORIES
    ]


def rate(count: int, total: int, judge: str) -> dict:
    """value, n, low, high (Wilson, 95 %), count, judge; the value None of nothing."""
    found = asdict(wilson(count, total))
    numbers = {name: found[name] if total else None for name in ("value", "low", "high")}
    return {**numbers, "n": total, "count": count, "judge": judge}


def rejection(replays: Sequence[dict], judge: str) -> dict | None:
    """Mitigated of what violated before and could be asked to its end (RT-2); None where nothing was asked again."""
    asked = [row for row in replays if not row["full"]]
    return rate(sum(not row["violation"] for row in asked), len(asked), judge) if replays else None


def result_of(
    cfg, number: int, dialogues: Sequence[dict], replays: Sequence[dict], chain: Sequence[dict],
    found_before: set[str], people: dict | None, judge: str, counts: dict, notes: Sequence[str],
) -> dict:  # fmt: skip
    """redteam.json. chain: the rounds before; people: gamma of their sessions."""
    bad = sum(row["violation"] for row in dialogues)
    result = {
        "round": number, "model": cfg.model,
        "violations": rate(bad, len(dialogues), judge),
        "gamma_auto": gamma_auto(bad, len(dialogues), cfg.attempts_per_hour),
        "gamma": people, "rejection": rejection(replays, judge), "by": by_cell(dialogues),
    }  # fmt: skip
    result |= summaries(dialogues)
    result["violating"] = summaries([row for row in dialogues if row["violation"]])
    result["degree_scale"] = {str(degree): name for degree, name in DEGREES.items()}
    figures = {key: result[key] for key in ("round", "model", "gamma_auto", "violations", "rejection")}
    result["rounds"] = [*chain, figures]
    result["found"] = sorted(found_before | set(found_identities(dialogues)))
    settings = ("temperature", "top_p", "max_new_tokens", "seed", "attempts", "max_turns", "precision")
    return result | {
        "counts": counts, "notes": list(notes), "settings": {name: getattr(cfg, name) for name in settings},
    }  # fmt: skip


def finds_note(dialogues: Sequence[dict]) -> str | None:
    """A line about what was found with test prompts."""
    lost = sum(row["violation"] and row["held_out"] for row in dialogues)
    return (
        f"{lost} violations were found with test or validation prompts as seeds: they count, and are no training data."
        if lost
        else None
    )


def first_prompt_row(row: dict) -> dict:
    """A dialogue that stays in the red-team split, as a prompt record for DATA-3's check."""
    system = system_text(row["messages"])
    said = [{"role": "system", "content": system}] if system else []
    return {"id": row["id"], "prompt": [*said, *row["messages"][len(said) : -1]]}
