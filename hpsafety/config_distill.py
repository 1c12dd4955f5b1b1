"""What `hpsafety distill` can be told; hpsafety.config hands DistillConfig out with the others."""

import dataclasses
from typing import Literal

from hpsafety.config import TrainConfig, option, require, require_at_least, require_kv_memory
from hpsafety.config_sampling import require_sampling
from hpsafety.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(TrainConfig):
    """Safety context distillation: what a preprompt does to the answers is trained into the weights."""

    model: str = option("chat model that answers and is then trained: HF directory, .gguf file, or smollm2")
    safety_rm: str = option("directory of the safety reward model, which judges every sample")
    data: tuple[str, ...] = option("JSON-lines files of prompts, or folders of the datasets library")
    preprompt: Literal["none", "generic", "template"] = option(
        "what the samples to learn from were asked with; none: a second plain sample", "template"
    )
    select: Literal["rm", "all"] = option(
        "samples to learn from: those the reward model scores above the plain answer, or all", "rm"
    )
    target: Literal["text", "kl"] = option(
        "fine-tune on the samples' text, or match the preprompted teacher's distribution on it", "text"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = option(
        "of the target kl: KL(teacher, student), KL(student, teacher) or Jensen-Shannon", "forward_kl"
    )
    teacher: str | None = option(
        "teacher of the target kl, with the model's tokenizer; the model's own weights, frozen, if absent",
        None,
    )
    templates: str | None = option("TOML file that changes or adds to the package's preprompts", None)
    system: bool = option(
        "append the preprompt to the chat template's system text instead of putting it before the user's",
        False,
    )
    k: int = option("samples per prompt with and without preprompt; each pair is decided on its own", 1)
    temperature: float = option("of sampling; 0 is greedy", 1.0)
    top_p: float = option("probability kept of the most likely words, above 0 to 1", 1.0)
    top_k: int = option("most likely words kept; 0: all", 0)
    max_new_tokens: int = option("tokens per sample, at most", 256)
    all_safety: bool = option("take rows without is_safety as safety rows", False)
    kv_memory: str | None = option(
        "memory for keys and values, as 2GB; a quarter of what is free if absent", None
    )
    max_batch: int = option("sequences decoded at once, at most", 64)
    epochs: int = option("passes over the kept samples", 2)
    lr: float = option("peak learning rate; a cosine takes it to a tenth", 2e-5)

    def __post_init__(self):
        TrainConfig.__post_init__(self)
        require(self, "safety_rm", bool(self.safety_rm), "a directory")
        for field, known in CHOICES.items():
            require(self, field, getattr(self, field) in known, f"one of {', '.join(known)}")
        require(self, "teacher", self.teacher != "", "a directory, a file or a name")
        require(self, "templates", self.templates != "", "a TOML file")
        require_at_least(self, 1, "k", "max_batch")
        require_at_least(self, 0, "top_k")
        require_sampling(self)
        require_kv_memory(self)
        if self.teacher and self.target != "kl":
            raise InputError(
                "--teacher needs --target kl: the target text learns from the model's own samples"
            )
        if self.preprompt == "none" and self.target == "kl" and not self.teacher:
            raise InputError(
                "--target kl with --preprompt none needs --teacher: without a preprompt the model's own weights "
                "have nothing to teach it"
            )


CHOICES = {
    "preprompt": ("none", "generic", "template"), "select": ("rm", "all"), "target": ("text", "kl"),
    "divergence": ("forward_kl", "reverse_kl", "jsd"),
}  # fmt: skip
