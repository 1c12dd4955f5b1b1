"""What ghost attention can be told; hpsafety.config hands it out with the others."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from hpsafety.config import TrainConfig, option, require, require_at_least, require_kv_memory
from hpsafety.errors import InputError

LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch")
# Languages that are told apart by their letters alone; asked for by name, since few small models write them.
SCRIPTS = ("Russian", "Greek", "Arabic", "Hindi", "Chinese", "Japanese", "Korean")
DEMO_DATA = str(Path(__file__).parent / "data" / "demo" / "dialogues.jsonl")
DEMO = {"model": "smollm2", "data": (DEMO_DATA,), "out": "gatt-demo-out"}  # with --demo, where not told else
# field: (its default, its default with --demo)
DEFAULTS = {
    "dialogues": (None, 20), "list_size": (20, 8), "max_new_tokens": (256, 32), "eval_dialogues": (16, 5),
    "eval_turns": ((2, 4, 6, 20), (2, 4, 6, 8)), "eval_tokens": (48, 24), "batch": (64, 4), "lr": (2e-5, 1e-4),
}  # fmt: skip


def _sized(help: str, field: str):
    """An option whose default depends on --demo: None stands for it until the config is made."""
    usual, small = ((" ".join(map(str, v)) if isinstance(v, tuple) else v) for v in DEFAULTS[field])
    usual = "" if usual is None else f"{usual}; "
    return option(f"{help} ({usual}{small} with --demo)", None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GAttConfig(TrainConfig):
    """Ghost attention: an instruction of the first turn that holds in all of them. Fields of DEFAULTS hold their
    values once it is made."""

    model: str = option(
        "newest model: it answers and is fine-tuned; HF directory, .gguf file, or smollm2", ""
    )
    data: tuple[str, ...] = option(
        "JSON-lines files of dialogues (user turns are enough), or folders of the datasets library", ()
    )
    out: str = option("run directory to write; a run found there is resumed", "")
    demo: bool = option(f"small, on {DEMO['model']} and built-in dialogues, to {DEMO['out']}", False)
    dialogues: int | None = _sized("dialogues to sample and train on, at most; all if absent", "dialogues")
    k: int = option("samples of a dialogue's last answer; the first that fits is trained on", 4)
    select: Literal["rules", "all"] = option(
        "rules: leave out last answers in another language than asked, or that repeat an earlier one", "rules"
    )
    turns: int = option("user turns of a dialogue that is joined from rows of a single turn", 4)
    list_size: int | None = _sized("hobbies, and public figures, asked of the model", "list_size")
    languages: tuple[str, ...] = option("names of the languages to answer in", LANGUAGES)
    temperature: float = option("of the softmax when answers are sampled; 0 is greedy", 0.7)
    top_p: float = option("probability kept of the most likely words, above 0 to 1", 0.95)
    top_k: int = option("most likely words kept; 0: all", 0)
    max_new_tokens: int | None = _sized("tokens per sampled answer, at most", "max_new_tokens")
    eval_dialogues: int | None = _sized(
        "dialogues per kind of instruction in the evaluation", "eval_dialogues"
    )
    eval_turns: tuple[int, ...] | None = _sized("turns that are probed, before and after", "eval_turns")
    eval_tokens: int | None = _sized("tokens per answer in the evaluation, at most", "eval_tokens")
    kv_memory: str | None = option(
        "memory for keys and values, as 2GB; a quarter of what is free if absent", None
    )
    max_batch: int = option("sequences decoded at once, at most", 64)
    batch: int | None = _sized("examples per optimiser step, over all ranks", "batch")
    epochs: int = option("passes over the dialogues", 2)
    lr: float | None = _sized("peak learning rate; a cosine takes it to a tenth", "lr")

    def __post_init__(self):
        given = DEMO if self.demo else {}
        given = given | {field: pair[self.demo] for field, pair in DEFAULTS.items()}
        for field, value in given.items():
            if getattr(self, field) in (None, "", ()):
                object.__setattr__(self, field, value)
        for field in DEMO:
            if not getattr(self, field):
                raise InputError(f"--{field} is missing; give it, or --demo for what is built in")
        TrainConfig.__post_init__(self)
        require_at_least(self, 1, "dialogues", "turns", "list_size", "max_new_tokens", "eval_dialogues")
        require_at_least(self, 1, "eval_tokens", "max_batch", "k")
        require(self, "select", self.select in ("rules", "all"), "rules or all")
        require_at_least(self, 0, "top_k")
        require(self, "temperature", 0 <= self.temperature < math.inf, "a number, 0 (greedy) or greater")
        require(self, "top_p", 0 < self.top_p <= 1, "above 0, up to 1")
        turns = self.eval_turns
        require(self, "eval_turns", bool(turns) and min(turns) >= 1, "one number or more, each at least 1")
        known = (*LANGUAGES, *SCRIPTS)
        fine = bool(self.languages) and set(self.languages) <= set(known)
        require(self, "languages", fine, f"of {', '.join(known)}")
        require_kv_memory(self)
