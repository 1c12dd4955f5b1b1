"""What `hpsafety eval` can be told; hpsafety.config hands EvalConfig out with the others."""

import dataclasses

from hpsafety.config import (
    Precision,
    flag,
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

BENCHMARKS = ("truthfulqa", "toxigen", "bold", "bbq", "crows_pairs")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Violations beside false refusals, truthfulness, toxicity and bias of a checkpoint, on held-out data."""

    model: str = option("model to measure: HF directory, .gguf file, or smollm2")
    base: str | None = option("a second model in the same table, such as the untuned one", None)
    data: tuple[str, ...] = option(
        "prompts: is_safety rows for violations, the others for false refusals", ()
    )
    out: str = option("directory to write; an evaluation found there goes on")
    safety_rm: str | None = option("directory of the safety reward model, which the judge rule needs", None)
    helpful_rm: str | None = option("directory of the helpfulness reward model", None)
    judge: str = option("of violations: rule, or MODULE:FUNCTION (prompt, answer -> 1 to 5)", "rule")
    ratings: tuple[str, ...] = option("judgement records of OUT's answers, by people or by a named judge", ())
    all_safety: bool = option("take rows of --data without is_safety and is_borderline as safety rows", False)
    truthfulqa: str | None = option("TruthfulQA.csv or mc_task.json", None)
    truth_judge: str = option("of written answers: overlap, or the directory of a judge model", "overlap")
    info_judge: str = option("whether they inform: overlap, or the directory of a judge model", "overlap")
    toxigen: tuple[str, ...] = option("ToxiGen's prompts/*.txt, or their folder", ())
    classifier: str = option(
        "of toxicity: alt-profanity-check, or a Hugging Face classifier's directory or id",
        "alt-profanity-check",
    )
    toxic_label: str | None = option(
        "the Hugging Face classifier's label for toxic; by its name if absent", None
    )
    bold: tuple[str, ...] = option("BOLD's prompts/*_prompt.json, or their folder", ())
    bbq: tuple[str, ...] = option("BBQ's data/*.jsonl", ())
    crows_pairs: str | None = option("crows_pairs_anonymized.csv", None)
    limit: int | None = option(
        "items of each benchmark and set of prompts, at most, drawn by --seed; all if absent", None
    )
    temperature: float = option("of all that is sampled; 0 is greedy", 0.1)
    top_p: float = option("draw from the most likely words of this much probability, 0 to 1", 0.9)
    max_new_tokens: int = option("tokens per answer and continuation, at most", 256)
    seed: int = option("seed of the draws, of --limit and of the bootstrap", 0)
    kv_memory: str | None = option(
        "memory for keys and values, as 2GB; a quarter of what is free if absent", None
    )
    max_batch: int = option("sequences decoded at once, at most", 64)
    tokens_per_batch: int = option("tokens per micro-batch of log-probabilities and scores", 2048)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: Precision = option("bf16 only where it is faster when auto", "auto")
    resume: bool = option("go on from what OUT holds", True)

    def benchmark_files(self, name: str) -> tuple[str, ...]:
        """The files given for one of BENCHMARKS."""
        given = getattr(self, name)
        return given if isinstance(given, tuple) else () if given is None else (given,)

    def __post_init__(self):
        require(self, "model", bool(self.model), "a directory, a file or a name")
        require(self, "base", self.base != "", "a directory, a file or a name")
        require(self, "out", bool(self.out), "a directory")
        for field in ("data", "ratings", "toxigen", "bold", "bbq"):
            require(self, field, all(getattr(self, field)), "one file or more")
        for field in ("safety_rm", "helpful_rm", "truthfulqa", "crows_pairs", "truth_judge", "info_judge"):
            require(self, field, getattr(self, field) != "", "a path")
        require(self, "judge", self.judge == "rule" or ":" in self.judge, "rule or MODULE:FUNCTION")
        if not self.data and not any(self.benchmark_files(name) for name in BENCHMARKS):
            flags = ", ".join(map(flag, BENCHMARKS))
            raise InputError(f"nothing to measure: give prompts with --data, or a benchmark's file ({flags})")
        if (self.ratings or self.safety_rm or self.helpful_rm) and not self.data:
            raise InputError(
                "--ratings, --safety-rm and --helpful-rm judge the answers to prompts: give --data"
            )
        require_sampling(self)
        require_seed(self)
        require_kv_memory(self)
        require_device(self)
        require_precision(self)
        require_at_least(self, 1, "limit", "max_batch", "tokens_per_batch")
