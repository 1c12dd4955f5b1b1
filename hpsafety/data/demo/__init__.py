"""The demo's own data: JSON-lines files, made by `python -m hpsafety.data.demo.generate`."""

from pathlib import Path

__all__ = ["path"]


def path(name: str) -> Path:
    """The file of a set: train, preferences, dialogues, heldout_adversarial, heldout_borderline or heldout_helpful.

    train holds demonstration records, preferences holds preference records (splits train and valid), dialogues holds
    prompt records of several user turns (splits train and valid), and the held-out files hold prompt records with a
    reference `response` beside.
    Raises ValueError for another name.
    """
    file = Path(__file__).with_name(f"{name}.jsonl")
    if not file.is_file():
        names = ", ".join(sorted(p.stem for p in file.parent.glob("*.jsonl")))
        raise ValueError(f"no demo data set {name!r}; there are {names}")
    return file
