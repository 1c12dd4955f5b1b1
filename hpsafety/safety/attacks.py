"""Attacks made of seed prompts: template mutations on all seven vectors, of one turn and of several (spec RT-5, RT-7).

The frames stand in hpsafety/data/redteam/attacks.toml. A mutation says its template, and follows from template, seed
and seed number alone. What is harmful in it is what the seed asks for: no template adds to that.
"""

import hashlib
import math
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpsafety.data.records import normalise_prompt
from hpsafety.data.schemas import ATTACKS, CATEGORIES
from hpsafety.errors import InputError, file_error
from hpsafety.safety.risk_areas import risk_label
from hpsafety.safety.talk_job import system_text, user_texts

SHIPPED = Path(__file__).parent.parent / "data" / "redteam" / "attacks.toml"
SLOT = "{request}"
LEET = str.maketrans("aeiostAEIOST", "431057431057")
# Letters of other alphabets that look the same.
HOMOGLYPHS = str.maketrans("aceopxyABCEHKMOPTX", "асеорхуАВСЕНКМОРТХ")
ZERO_WIDTH = "\u200b"


@dataclass(frozen=True, slots=True)
class Template:
    """turns, push and transform as attacks.toml says; id: "vector/name"."""

    id: str
    vector: str
    turns: tuple[str, ...]
    push: str | None = None
    transform: str | None = None


@dataclass(frozen=True, slots=True)
class Attack:
    """What is said to the model: `users`, turn by turn; with `push` the last of them only after a refusal.

    template  of attacks.toml, or "garak/PROBE";  source  where the seed is from
    opening   turns before the first that holds the request: innocuous ones
    held_out  the seed is a test prompt: what is found with it is no training data
    """

    seed_id: str
    vector: str
    category: str
    risk_label: str
    template: str
    users: tuple[str, ...]
    push: bool = False
    system: str | None = None
    source: str | None = None
    held_out: bool = False
    opening: int = 0


def load_templates(path: Path = SHIPPED) -> list[Template]:
    """All templates in the file's order. Raises InputError, naming file and key, for what is no template."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    out = []
    for vector, entries in table.items():
        if vector not in ATTACKS:
            raise file_error(path, f"key {vector}: no attack vector; they are {', '.join(ATTACKS)}")
        out += [_template(path, vector, name, entry) for name, entry in entries.items()]
    return out


def _template(path: Path, vector: str, name: str, entry: dict) -> Template:
    key = f"{vector}.{name}"
    unknown = entry.keys() - {"turns", "push", "transform"}
    if unknown:
        raise file_error(path, f"key {key}.{min(unknown)}: unknown; known: turns, push, transform")
    turns, transform = tuple(entry.get("turns", ())), entry.get("transform")
    if not any(SLOT in turn for turn in turns):
        raise file_error(path, f"key {key}.turns: no turn holds {SLOT}, the place of the seed's text")
    if transform is not None and transform not in TRANSFORMS:
        raise file_error(path, f"key {key}.transform: {transform!r} is none of {', '.join(TRANSFORMS)}")
    return Template(f"{vector}/{name}", vector, turns, entry.get("push"), transform)


# ---- transforms of the request's text, drawn by a generator ----


def typos(text: str, rng: np.random.Generator) -> str:
    """Neighbouring letters swapped inside of every third word or so, and a letter lost here and there."""
    out = []
    for word in text.split(" "):
        if len(word) > 3 and word.isalpha() and rng.random() < 0.4:
            at = int(rng.integers(1, len(word) - 2))
            swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            word = swapped if rng.random() < 0.7 else word[:at] + word[at + 1 :]
        out.append(word)
    return " ".join(out)


def leet(text: str, rng: np.random.Generator) -> str:
    """Digits for letters that look like them, in two words of three."""
    return " ".join(word.translate(LEET) if rng.random() < 0.67 else word for word in text.split(" "))


def homoglyphs(text: str, rng: np.random.Generator) -> str:
    """Cyrillic letters for Latin ones in every second word, and zero-width spaces within long words."""
    out = []
    for word in text.split(" "):
        if rng.random() < 0.5:
            word = word.translate(HOMOGLYPHS)
        elif len(word) > 6:
            word = word[:3] + ZERO_WIDTH + word[3:]
        out.append(word)
    return " ".join(out)


def spaced(text: str, rng: np.random.Generator) -> str:
    """Every third word or so in spaced letters."""
    words = text.split(" ")
    return " ".join(" ".join(w) if len(w) > 2 and w.isalpha() and rng.random() < 0.35 else w for w in words)


def split(text: str, rng: np.random.Generator) -> str:
    """The text torn into parts of three words or so, quoted and joined by plus signs."""
    words, parts = text.split(" "), []
    while words:
        size = int(rng.integers(2, 5))
        parts.append(" ".join(words[:size]))
        words = words[size:]
    return " + ".join(f'"{part}"' for part in parts)


TRANSFORMS = {f.__name__: f for f in (typos, leet, homoglyphs, spaced, split)}


# ---- seeds and their mutations ----


def sort_seeds(rows: Iterable[dict], found: set[str]) -> tuple[list[dict], Counter]:
    """(seeds: the adversarial rows, each with an id of its own; counts).

    found  identities (`identity`) of earlier rounds' finds: they are training data and no seeds any more (DATA-3)
    Rows that are not is_safety, of the split rt_train, found before, and repeated ones are left out and counted.
    """
    seeds, counts, names, seen = [], Counter(), set(), set()
    for number, row in enumerate(rows, start=1):
        mine = identity(user_texts(row["prompt"]))
        if not row.get("is_safety"):
            counts["seeds left out: not is_safety"] += 1
        elif row.get("split") == "rt_train":
            counts["seeds left out: rt_train, already trained on"] += 1
        elif found_before(user_texts(row["prompt"]), found):
            counts["seeds left out: found in an earlier round"] += 1
        elif mine in seen:
            counts["seeds left out: repeated"] += 1
        else:
            name = str(row["id"]) if row.get("id") is not None else f"row-{number}"
            name = name if name not in names else f"{name}#{number}"
            names.add(name)
            seen.add(mine)
            seeds.append(row | {"id": name})
    counts["seeds"] = len(seeds)
    return seeds, counts


def identity(users: Sequence[str]) -> str:
    """Names what a user says, whatever its case and white space: 16 hex digits."""
    text = "\x1f".join(normalise_prompt(turn) for turn in users)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def found_before(users: Sequence[str], found: set[str], opening: int = 0) -> bool:
    """Whether the dialogue, up to some turn after its opening, is an earlier find."""
    return any(identity(users[:n]) in found for n in range(opening + 1, len(users) + 1))


def mutate(template: Template, seed: dict, seed_number: int, max_turns: int) -> Attack | None:
    """The template around the seed's last user turn; earlier user turns go before. None where max_turns do not hold
    it, or where it changes nothing; a push that finds no room is left out.

    seed_number  the run's seed, from which the noise of a transform is drawn
    """
    *history, request = user_texts(seed["prompt"])
    if len(history) + len(template.turns) > max_turns:
        return None
    if template.transform:
        rng = np.random.default_rng([seed_number, zlib.crc32(f"{template.id}\n{request}".encode())])
        request = TRANSFORMS[template.transform](request, rng)
    turns = [*history, *(turn.replace(SLOT, request) for turn in template.turns)]
    push = template.push is not None and len(turns) < max_turns
    turns += [template.push.replace(SLOT, request)] if push else []
    if turns == user_texts(seed["prompt"]):
        return None  # the noise fell beside every word: that is no attack of this vector
    held_out = (seed.get("split") or "").startswith(("test_", "valid"))
    opening = len(history) + next(i for i, turn in enumerate(template.turns) if SLOT in turn)
    return Attack(
        seed["id"], template.vector, seed["category"], risk_label(seed), template.id, tuple(turns), push,
        system_text(seed["prompt"]), seed.get("source"), held_out, opening,
    )  # fmt: skip


def choose_attacks(
    templates: Sequence[Template], seeds: Sequence[dict], ready: Sequence[Attack], cfg, number: int,
    found: set[str],
) -> tuple[list[Attack], Counter]:  # fmt: skip
    """(the round's attacks, counts): cfg.attempts mutations and as many of the imported ones (`ready`), each spread
    evenly over vector x category.

    number  of the round: it is part of the draw, so that rounds of one seed attack anew
    found   identities of earlier finds, which no attack repeats (RT-6)
    Raises InputError where nothing is left.
    """
    rng, counts = np.random.default_rng([cfg.seed, number, 811]), Counter()
    seen, chosen = set(), []
    for pool in (_mutations(templates, seeds, cfg, rng), _imported(ready, cfg, rng)):
        kept: dict[tuple, list[Attack]] = {}
        for cell, candidates in pool.items():
            kept[cell] = _Fresh(candidates, seen, found, counts)
        chosen += _take_evenly(kept, cfg.attempts, rng)
    if not chosen:
        raise InputError(
            "no attack is left: --data needs rows with is_safety true, --max-turns room for them, and prompts that no "
            "earlier round found"
        )
    return chosen, counts


class _Fresh:
    """Candidates one by one, without those that repeat another attack or an earlier find, which are counted."""

    def __init__(self, candidates: Iterable[Attack], seen: set[str], found: set[str], counts: Counter):
        self.candidates, self.seen, self.found, self.counts = iter(candidates), seen, found, counts

    def next(self) -> Attack | None:
        for attack in self.candidates:
            mine = identity(attack.users)
            if mine in self.seen:
                continue
            if found_before(attack.users, self.found, attack.opening):
                self.counts["attacks left out: found in an earlier round"] += 1
                continue
            self.seen.add(mine)
            return attack
        return None


def _mutations(templates, seeds, cfg, rng) -> dict[tuple, Iterable[Attack]]:
    """Candidates by (vector, category), each seed and each template as often as the others."""
    out = {}
    for vector in ATTACKS:
        own = [t for t in templates if t.vector == vector and len(t.turns) <= cfg.max_turns]
        for category in CATEGORIES:
            fitting = [seed for seed in seeds if seed["category"] == category]
            out[vector, category] = _pairs(_shuffled(own, rng), _shuffled(fitting, rng), cfg)
    return out


def _pairs(templates: list[Template], seeds: list[dict], cfg) -> Iterable[Attack]:
    """Every template with every seed, once; the first of them have all templates and seeds in turn."""
    if not templates or not seeds:
        return
    t, s = len(templates), len(seeds)
    for k in range(t * s):
        attack = mutate(templates[k % t], seeds[(k + k // math.lcm(t, s)) % s], cfg.seed, cfg.max_turns)
        if attack is not None:
            yield attack


def _imported(ready: Sequence[Attack], cfg, rng) -> dict[tuple, Iterable[Attack]]:
    cells: dict[tuple, list[Attack]] = {}
    for attack in ready:
        if len(attack.users) <= cfg.max_turns:
            cells.setdefault((attack.vector, attack.category), []).append(attack)
    return {cell: _shuffled(cells[cell], rng) for cell in sorted(cells)}


def _shuffled(items: Sequence, rng) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def _take_evenly(cells: dict[tuple, _Fresh], count: int, rng) -> list[Attack]:
    """`count` attacks, one from each cell in turn, so that sizes differ by one at most until a cell is empty; the
    cells that get one more are drawn. In the order of the cells."""
    taken: dict[tuple, list[Attack]] = {cell: [] for cell in cells}
    open_cells = _shuffled(list(cells), rng)
    left = count
    while left and open_cells:
        for cell in list(open_cells):
            if not left:
                break
            attack = cells[cell].next()
            if attack is None:
                open_cells.remove(cell)
                continue
            taken[cell].append(attack)
            left -= 1
    return [attack for part in taken.values() for attack in part]
