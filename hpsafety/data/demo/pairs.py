"""The demo's preference pairs, made from its training prompts: preferences.jsonl.

A pair's rejected answer is worse in one known way, a `Degradation`, and the rating follows from that way alone:

    complies eagerly        significantly    the kind refusal against full compliance
    hardly an answer        better           the answer against something vague
    lacks a detail          slightly         the answer against the same with its last sentence gone
    only reworded           negligibly       two answers of one worth

The texts are in templates/pairs_frames.toml (what is said around) and templates/pairs_safety.toml (what each safety
template asks, why not, what instead). Unsafe answers hold placeholders in place of anything that works (DATA-4), and
a kind one declines, explains the risk and gives further information (guideline of spec section 0).

A reward model must not win by length: of each degradation, every second pair has the shorter answer chosen, where
the frames allow it. Nor by a word: kind and unsafe answers share their openings, brackets and excuses.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice

from hpsafety.data.demo.texts import fill, read_toml

SEED = 0
HELPFUL_PAIRS = 180
VALID_EVERY = 5  # one template in five is for validation, with all of its prompts and pieces
BATCHES = 4  # weekly batches (PREF-3)
MOST_WORDS = 90  # prompt and both answers: at most about 120 tokens of smollm2
TRIES = 200
WHOLE_ANSWER = 0.25  # share of kind refusals that are the training answer itself
# who wrote `chosen` and who `rejected`, in name only: two different ones for each pair (PREF-1)
GENERATORS = [
    {"model": f"hpsafety-demo-{name}", "temperature": temperature}
    for name in "AB"
    for temperature in (0.7, 1.0)
]


@dataclass(frozen=True, slots=True)
class Degradation:
    """One way in which a rejected answer is worse.

    chosen, rejected  the kinds of text compared, keys of pairs_frames.toml or of `HelpfulTexts`
    weight            pairs out of the sum of the weights
    """

    name: str
    rating: str
    chosen: str
    rejected: str
    weight: int
    safety_bin: int | None = None


# Bins 1, 2, 3 get 16, 14, 10 of 40 pairs: 40/35/25 %. The paper's 18/47/35 % would leave a small set with too few
# pairs of bin 1, the only one that shows a safe answer beside an unsafe one, which is what the safety model must learn.
SAFETY = (
    Degradation("complies eagerly", "significantly", "kind", "eager", 8, 1),
    Degradation("notes the problem, then complies", "better", "kind", "noted", 5, 1),
    Degradation("declines, then gives a part", "slightly", "kind", "slip", 3, 1),
    Degradation("accuses the user", "significantly", "kind", "accusing", 3, 2),
    Degradation("curt or preachy", "better", "kind", "cold", 5, 2),
    Degradation("no further information", "slightly", "kind", "bare", 3, 2),
    Degradation("only reworded", "negligibly", "kind", "kind", 3, 2),
    Degradation("complies eagerly instead of in part", "significantly", "slip", "eager", 2, 3),
    Degradation("complies without a warning", "better", "noted", "eager", 2, 3),
    Degradation("complies in full instead of in part", "slightly", "slip", "noted", 3, 3),
    Degradation("only reworded", "negligibly", "eager", "eager", 3, 3),
)
HELPFUL = (
    Degradation("wrong topic", "significantly", "answer", "wrong_topic", 3),
    Degradation("needless refusal", "significantly", "answer", "refusal", 3),
    Degradation("hardly an answer", "better", "answer", "vague", 5),
    Degradation("lacks a detail", "slightly", "whole", "detail_gone", 3),
    Degradation("needless warning", "slightly", "answer", "warned", 2),
    Degradation("only reworded", "negligibly", "reworded", "reworded", 4),
)
SAFE = {1: (True, False), 2: (True, True), 3: (False, False)}  # safety_bin: (chosen_safe, rejected_safe)
# after . ? or !, also when a quotation mark closes the sentence
_SENTENCE_END = re.compile(r"""(?:(?<=[.?!])|(?<=[.?!]["']))\s+""")


def preference_rows(train: list[dict], tables: dict[str, dict]) -> list[dict]:
    """The pairs in batch order.

    train   the demonstrations, whose prompts the pairs share: no held-out prompt can come in (DATA-3)
    tables  template id -> table, as `generate.templates` gives them
    """
    rng = random.Random(SEED)
    safety = [row for row in train if row["is_safety"]]
    helpful = rng.sample([row for row in train if not row["is_safety"]], HELPFUL_PAIRS)
    frames = read_toml("pairs_frames")
    rows = []
    for part in split_by_template(safety):
        rows += pairs_of(part, SAFETY, SafetyTexts(frames["safety"], read_toml("pairs_safety")), rng)
    for part in split_by_template(helpful):
        rows += pairs_of(part, HELPFUL, HelpfulTexts(frames["helpful"], tables, part), rng)
    rng.shuffle(rows)
    rows = [row | {"batch": index % BATCHES + 1} for index, row in enumerate(rows)]
    return sorted(rows, key=lambda row: row["batch"])


def split_by_template(rows: list[dict]) -> list[list[dict]]:
    """The rows of the training and of the validation templates, each with its split set.

    Whole templates, so that no piece of a validation answer was seen in training; in an order in which every fifth
    comes from all attacks and topics.
    """
    keys = {(row["is_borderline"], row["attack"] or "", row["template"]) for row in rows}
    valid = {template for *_, template in sorted(keys)[2::VALID_EVERY]}
    parts: dict[str, list[dict]] = {"train": [], "valid": []}
    for row in rows:
        split = "valid" if row["template"] in valid else "train"
        parts[split].append(row | {"split": split})
    return list(parts.values())


def pairs_of(rows: list[dict], degradations: tuple, texts, rng: random.Random) -> list[dict]:
    """One pair for each row. The degradations are dealt by weight, first to the rows that few of them fit."""
    cards = [card for card in degradations for _ in range(card.weight)]
    rng.shuffle(cards)
    deck = list(islice(cycle(cards), len(rows)))
    wants_shorter = {card: cycle([True, False]) for card in degradations}
    pairs, used = [], set()
    for row in sorted(rows, key=texts.choices):
        card = next(card for card in deck if texts.fits(row, card))
        deck.remove(card)
        chosen, rejected = draw_pair(row, card, texts, next(wants_shorter[card]), used)
        used |= {chosen, rejected}
        pairs.append(pair_row(row, card, chosen, rejected, rng.sample(GENERATORS, 2)))
    return pairs


def draw_pair(row: dict, card: Degradation, texts, shorter: bool, used: set[str]) -> tuple[str, str]:
    """The best of up to TRIES drawn pairs: first by which text is the shorter one, as asked, then by not being used.

    Raises ValueError where no two different texts stay within MOST_WORDS.
    """
    rng = random.Random(f"{SEED} {row['id']}")
    budget = MOST_WORDS - len(row["prompt"].split())
    best, found = (), None
    for _ in range(TRIES):
        chosen, rejected = (texts.write(kind, row, rng) for kind in (card.chosen, card.rejected))
        if chosen == rejected or len(chosen.split()) + len(rejected.split()) > budget:
            continue
        quality = ((len(chosen) < len(rejected)) == shorter, used.isdisjoint((chosen, rejected)))
        if quality > best:
            best, found = quality, (chosen, rejected)
        if all(quality):
            break
    if found is None:
        raise ValueError(f"no pair for {row['id']} ({card.name}) within {MOST_WORDS} words")
    return found


def pair_row(row: dict, card: Degradation, chosen: str, rejected: str, generators: list[dict]) -> dict:
    """The record: the prompt's fields from its demonstration, then what is the pair's own."""
    chosen_safe, rejected_safe = SAFE.get(card.safety_bin, (True, True))
    own = {
        "chosen": chosen,
        "rejected": rejected,
        "rating": card.rating,
        "degradation": card.name,
        "gen_a": generators[0],
        "gen_b": generators[1],
    }
    if card.safety_bin is not None:
        own |= {
            "safety_bin": card.safety_bin,
            "chosen_safe": chosen_safe,
            "rejected_safe": rejected_safe,
        }
    kept = {name: value for name, value in row.items() if name != "response"}
    return kept | {"id": f"pair-{row['id']}"} | own


class SafetyTexts:
    """Answers to an adversarial prompt, from frames and from the pieces of its template."""

    def __init__(self, frames: dict[str, list[str]], pieces: dict[str, dict]):
        self.frames, self.pieces = frames, pieces

    def choices(self, row: dict) -> int:
        """2 where every degradation fits, 1 where few do."""
        return 2 if self.has_steps(row) else 1

    def fits(self, row: dict, card: Degradation) -> bool:
        """Somebody in distress is neither given an unsafe answer nor accused."""
        return self.has_steps(row) or (card.safety_bin == 2 and card.rejected != "accusing")

    def has_steps(self, row: dict) -> bool:
        return "steps" in self.pieces[row["template"]]

    def write(self, kind: str, row: dict, rng: random.Random) -> str:
        """A text of the kind, one of the keys of [safety] in pairs_frames.toml."""
        if kind == "kind":
            if rng.random() < WHOLE_ANSWER and self.answer_stands_alone(row):
                return row["response"]
            kind = "kind" if self.has_steps(row) else "gentle"
        text = fill(rng.choice(self.frames[kind]), self.filled_pieces(row))
        return joined(text, rng.choice(self.frames["cheer"])) if kind == "eager" else text

    def answer_stands_alone(self, row: dict) -> bool:
        """Whether the training answer is in English and repeats no slot in the user's own words."""
        slots = row["slots"].values()
        return row["attack"] != "non_english" and not any(
            text in row["response"] and in_answer(text) != text for text in slots
        )

    def filled_pieces(self, row: dict) -> dict[str, str]:
        """What the frames may name: task, why, instead, first and steps, and each with a capital."""
        table = self.pieces[row["template"]]
        slots = {name: in_answer(text) for name, text in row["slots"].items()}
        pieces = {name: fill(table[name], slots) for name in ("task", "why", "instead")}
        if "steps" in table:
            steps = [fill(step, slots) for step in table["steps"]]
            pieces |= {"first": steps[0], "steps": as_phrase(steps)}
        return pieces | {name.capitalize(): text[0].upper() + text[1:] for name, text in pieces.items()}


class HelpfulTexts:
    """Answers to a harmless prompt, from its demonstration, from frames and from answers to other prompts."""

    def __init__(self, frames: dict[str, list[str]], tables: dict[str, dict], rows: list[dict]):
        self.frames, self.tables, self.rows = frames, tables, rows
        self.kinds: dict[str, Callable[[dict, random.Random], str]] = {
            "whole": lambda row, rng: row["response"],
            "answer": lambda row, rng: rng.choice([row["response"], self.core(row)]),
            "wrong_topic": self.wrong_topic,
            "refusal": lambda row, rng: rng.choice(frames["refusal"]),
            "vague": lambda row, rng: rng.choice(frames["vague"]),
            "detail_gone": lambda row, rng: joined(but_last(row["response"]), rng.choice(frames["filler"])),
            "warned": lambda row, rng: joined(self.core(row), rng.choice(frames["warning"])),
            "reworded": lambda row, rng: joined(
                rng.choice(frames["opener"]), self.core(row), rng.choice(frames["closer"])
            ),
        }

    def choices(self, row: dict) -> int:
        """2 where every degradation fits, 1 where one does not."""
        return 2 if row["is_borderline"] else 1

    def fits(self, row: dict, card: Degradation) -> bool:
        """A needless warning fits where the words alarm."""
        return row["is_borderline"] or card.rejected != "warned"

    def write(self, kind: str, row: dict, rng: random.Random) -> str:
        """A text of the kind, one of the keys of `kinds`."""
        return self.kinds[kind](row, rng)

    def core(self, row: dict) -> str:
        """The answer without the closing sentence that all answers of its template share, where they share one."""
        shares_closing = not self.tables[row["template"]]["responses"][0].endswith("}")
        return but_last(row["response"]) if shares_closing else row["response"]

    def wrong_topic(self, row: dict, rng: random.Random) -> str:
        """The answer to a prompt on another topic, of the same split."""
        return self.core(rng.choice([other for other in self.rows if other["category"] != row["category"]]))


def in_answer(text: str) -> str:
    """A slot's text as an answer says it: the user's my is your, and a name in a format has its spaces back."""
    return re.sub(r"\b(my|our)(self)?\b", r"your\2", text).replace("_", " ")


def as_phrase(steps: list[str]) -> str:
    """a and b; a, b, and c."""
    return ", ".join(steps[:-1]) + (", and " if len(steps) > 2 else " and ") + steps[-1]


def joined(*parts: str) -> str:
    return " ".join(filter(None, parts))


def but_last(text: str) -> str:
    """The text without its last sentence, or a verse without its last line."""
    if " / " in text:
        return text.rsplit(" / ", 1)[0]
    sentences = _SENTENCE_END.split(text)
    return " ".join(sentences[:-1]) or text
