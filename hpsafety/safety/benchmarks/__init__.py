"""Public benchmarks: readers of their publishers' files and the rules that score them. Pure functions, no model."""

import re

# flag of hpsafety eval -> (what its file is, where it is to be had)
WHERE = {
    "truthfulqa": ("TruthfulQA.csv or mc_task.json", "https://github.com/sylinrl/TruthfulQA"),
    "toxigen": ("prompts/*.txt", "https://github.com/microsoft/TOXIGEN"),
    "bold": ("prompts/*_prompt.json", "https://github.com/amazon-science/bold"),
    "bbq": ("data/*.jsonl", "https://github.com/nyu-mll/BBQ"),
    "crows_pairs": ("data/crows_pairs_anonymized.csv", "https://github.com/nyu-mll/crows-pairs"),
}


def obtain(name: str) -> str:
    """A line that says where a benchmark's file is to be had and how to give it."""
    what, where = WHERE[name]
    return f"get {what} from {where} and give it with --{name.replace('_', '-')}"


def slug(text: str) -> str:
    """A name as it stands in a metric's key."""
    return re.sub(r"[^\w]+", "_", text.strip()).strip("_").lower()
