"""What `hpsafety report` and `hpsafety card` can be told; hpsafety.config hands them out with the others."""

import dataclasses
import math

from hpsafety.config import option, require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """One HTML file of everything a run measured; with two runs, one beside the other."""

    runs: tuple[str, ...] = option(
        "run directory: of a pipeline, of several runs, or of one; a second one to compare with",
        positional="RUN",
    )
    out: str | None = option(
        "HTML file to write, with two CSV files beside it; RUN/report.html if absent", None
    )

    def __post_init__(self):
        require(self, "runs", 1 <= len(self.runs) <= 2 and all(self.runs), "one run directory or two")
        require(self, "out", self.out is None or self.out.endswith(".html"), "a file that ends in .html")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CardConfig:
    """The model card of a run: what it cannot know is told by these flags, or reads "not measured"."""

    run_dir: str = option("run directory: of a pipeline, of several runs, or of one", positional="RUN")
    out: str | None = option("directory for card.md and card.html; RUN/card if absent", None)
    developers: str | None = option("who made the model", None)
    license: str | None = option("its license, as Hugging Face names it (apache-2.0)", None)
    contact: str | None = option("where to send comments", None)
    languages: tuple[str, ...] = option("languages it was tested in, as ISO codes (en)", ())
    intended_use: str | None = option("what it is meant for", None)
    out_of_scope: str | None = option("what it must not be used for", None)
    cutoff: str | None = option("newest training data, pretraining and tuning", None)
    watts: float | None = option("mean power of the machine while it trained, watts; for the energy", None)

    def __post_init__(self):
        require(self, "run_dir", bool(self.run_dir), "a run directory")
        require(self, "out", self.out != "", "a directory")
        for field in ("developers", "license", "contact", "intended_use", "out_of_scope", "cutoff"):
            value = getattr(self, field)
            require(self, field, value is None or bool(value.strip()), "some text")
        require(self, "languages", all(word.isalpha() for word in self.languages), "ISO codes such as en")
        require(self, "watts", self.watts is None or 0 < self.watts < math.inf, "a number greater than 0")
