"""Ghost attention's instructions: three families, combined at random, half of them terse (spec section 6, GATT-3).

The wording is ours. An instruction stands before the user's text, in the user's turn.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

FAMILIES = ("figure", "hobby", "language")  # in the order they stand in an instruction
COMBINATIONS = [c for size in (1, 2, 3) for c in combinations(FAMILIES, size)]
FULL = {
    "figure": "From now on you are {value}, and you stay in that role in every answer.",
    "hobby": "Your favourite hobby is {value}; remember that until the end of our conversation.",
    "language": "Whatever I ask you, answer in {value} until the end of our conversation.",
}
TERSE = {"figure": "Role: {value}.", "hobby": "Hobby: {value}.", "language": "Language: {value}."}
# Constraints that are never trained on, to see whether what is learnt is more than the three families (GATT-5). A rule
# can check them on an answer that was cut.
UNSEEN = {"opening": ("Begin every answer with the word {value}.", ("Ahoy", "Aloha", "Hooray", "Bravo"))}


@dataclass(frozen=True, slots=True)
class Instruction:
    """text as the model reads it; values: family -> hobby, language or name."""

    text: str
    values: dict[str, str]
    terse: bool


def write(values: dict[str, str], terse: bool) -> str:
    """The instruction of these families, in their fixed order."""
    forms = TERSE if terse else FULL
    parts = (forms[family].format(value=values[family]) for family in FAMILIES if family in values)
    return " ".join(parts).replace("..", ".")  # a name may end in Jr.


def draw(count: int, lists: dict[str, list[str]], seed: int) -> list[Instruction]:
    """`count` instructions: a non-empty set of families each, all seven as likely, a value of each list; exactly half
    (rounded down) are terse, whatever their families."""
    rng = np.random.default_rng([seed, count])
    terse = rng.permutation(count) < count // 2
    out = []
    for short in terse:
        families = COMBINATIONS[rng.integers(len(COMBINATIONS))]
        values = {family: lists[family][rng.integers(len(lists[family]))] for family in families}
        out.append(Instruction(write(values, bool(short)), values, bool(short)))
    return out


def attach(instruction: str, text: str) -> str:
    """A user's turn with the instruction in it."""
    return f"{instruction}\n\n{text}"
