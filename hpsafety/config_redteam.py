"""What `hpsafety redteam` can be told; hpsafety.config hands RedteamConfig out with the others."""

import dataclasses
import math

from hpsafety.config import (
    Precision,
    option,
    require,
    require_at_least,
    require_device,
    require_kv_memory,
    require_precision,
    require_seed,
)
from hpsafety.config_sampling import require_sampling
from hpsafety.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RedteamConfig:
    """A red-team round: attacks on a model, what they found, and whether it still falls for what was found before."""

    model: str = option("model to attack: HF directory, .gguf file, or smollm2")
    data: tuple[str, ...] = option("JSON-lines files of prompts; the is_safety rows are the seeds", ())
    out: str = option("directory to write; a round found there goes on")
    safety_rm: str | None = option("directory of the safety reward model, which the judge rule needs", None)
    judge: str = option("of violations: rule, or MODULE:FUNCTION (prompt, answer -> 1 to 5)", "rule")
    previous: tuple[str, ...] = option(
        "directories of earlier rounds, whose violations are asked again; their finds are attacked no more",
        (),
    )
    sessions: tuple[str, ...] = option("JSON-lines files of people's red-team sessions, for gamma", ())
    garak: tuple[str, ...] = option(
        "garak's hit logs, reports or prompt files (.jsonl, .json, .txt), as attacks beside the mutations", ()
    )
    attempts: int = option("mutations, spread evenly over vectors and categories; as many imported ones", 210)
    attempts_per_hour: float = option("attempts an hour that gamma_auto assumes", 12.0)
    max_turns: int = option("user turns of an attack, at most; longer ones are left out", 3)
    temperature: float = option("of the answers; 0 is greedy", 0.7)
    top_p: float = option("draw from the most likely words of this much probability, 0 to 1", 0.9)
    max_new_tokens: int = option("tokens per answer, at most", 128)
    seed: int = option("seed of the choice of attacks, of their noise and of the answers", 0)
    kv_memory: str | None = option(
        "memory for keys and values, as 2GB; a quarter of what is free if absent", None
    )
    max_batch: int = option("sequences decoded at once, at most", 64)
    tokens_per_batch: int = option("tokens per micro-batch of scores", 2048)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: Precision = option("bf16 only where it is faster when auto", "auto")
    resume: bool = option("go on from what OUT holds", True)

    def __post_init__(self):
        require(self, "model", bool(self.model), "a directory, a file or a name")
        require(self, "out", bool(self.out), "a directory")
        for field in ("data", "previous", "sessions", "garak"):
            require(self, field, all(getattr(self, field)), "one path or more")
        if not self.data and not self.garak:
            raise InputError("nothing to attack with: give seeds with --data, or garak's files with --garak")
        require(self, "judge", self.judge == "rule" or ":" in self.judge, "rule or MODULE:FUNCTION")
        require(self, "safety_rm", self.safety_rm != "", "a directory")
        if self.judge == "rule" and self.safety_rm is None:
            raise InputError(
                "the judge rule needs a safety reward model: give --safety-rm, or another --judge"
            )
        require_at_least(self, 1, "attempts", "max_turns", "max_batch", "tokens_per_batch")
        fine = 0 < self.attempts_per_hour < math.inf
        require(self, "attempts_per_hour", fine, "a number greater than 0")
        require_sampling(self)
        require_seed(self)
        require_kv_memory(self)
        require_device(self)
        require_precision(self)
