"""What `hpsafety audit` can be told; hpsafety.config hands AuditConfig out with the others."""

import dataclasses

from hpsafety.config import memory_bytes, option, require, require_at_least, require_seed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig:
    """A corpus described: languages, pronouns, identity terms, toxicity. It measures and never filters."""

    data: tuple[str, ...] = option(
        "corpus files, or folders of them: .jsonl, .json, .txt (also with .gz or .zst) and .parquet"
    )
    out: str = option("directory to write; an audit found there goes on")
    seed: int = option("seed of the sample whose toxicity is scored", 0)
    toxicity_sample: float = option("share of the English documents whose toxicity is scored, 0 to 1", 0.1)
    classifier: str = option(
        "of toxicity: alt-profanity-check, or a Hugging Face classifier's directory or id",
        "alt-profanity-check",
    )
    toxic_label: str | None = option(
        "the Hugging Face classifier's label for toxic; by its name if absent", None
    )
    max_line: str = option(
        "longest line, as 16MB; a longer one is a fault, and is not held in memory", "16MB"
    )
    keep_going: bool = option(
        "count and name broken input and go on, instead of stopping at the first", False
    )
    workers: int | None = option("processes; one per core if absent; never changes a result", None)
    resume: bool = option("go on from what OUT holds", True)

    @property
    def max_line_bytes(self) -> int:
        return memory_bytes(self.max_line)

    def __post_init__(self):
        require(self, "data", len(self.data) > 0 and all(self.data), "one file or more")
        require(self, "out", bool(self.out), "a directory")
        require_seed(self)
        require(self, "toxicity_sample", 0 <= self.toxicity_sample <= 1, "from 0 to 1")
        require(self, "classifier", bool(self.classifier), "alt-profanity-check, a directory or an id")
        require(self, "max_line", memory_bytes(self.max_line) is not None, "a size such as 16MB")
        require_at_least(self, 1, "workers")
