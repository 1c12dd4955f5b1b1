"""A Hugging Face sequence classifier as the judge of toxicity. transformers is needed for it, and for nothing else."""

from pathlib import Path

from hpsafety.errors import InputError
from hpsafety.safety.toxicity import Classifier

TOXIC = ("toxic", "toxicity", "hate", "hateful", "label_1")  # labels that are taken unasked, in lower case


def load_hf_classifier(name: str, toxic_label: str | None) -> Classifier:
    """name  a directory, or an id of the hub; safetensors only, and no code of the model's own.

    A line longer than the model takes is cut to its first tokens. Each line is scored alone, whatever stands beside it:
    a padded batch would move the last bits. Raises InputError where the model cannot be loaded or no label says toxic.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise InputError(
            '--classifier: a Hugging Face model needs transformers: pip install "hpsafety[hf]"'
        ) from None
    torch.set_num_threads(1)  # every worker process has its own copy
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--classifier {name}: cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    labels = {int(index): str(label) for index, label in model.config.id2label.items()}
    place = toxic_place(labels, toxic_label, name)
    one_score = model.config.problem_type == "multi_label_classification" or len(labels) == 1
    positions = (
        getattr(model.config, "max_position_embeddings", 512) - 2
    )  # two of RoBERTa's are not for tokens
    longest = min(tokenizer.model_max_length, positions)

    @torch.inference_mode()
    def scores(lines: list[str]) -> list[float]:
        out = []
        for line in lines:
            encoded = tokenizer(line, truncation=True, max_length=longest, return_tensors="pt")
            logits = model(**encoded).logits[0].double()
            chances = logits.sigmoid() if one_score else logits.softmax(0)
            out.append(float(chances[place]))
        return out

    shown = Path(name).name if Path(name).is_dir() else name
    return Classifier(f"{shown}, label {labels[place]!r} (Hugging Face)", scores)


def toxic_place(labels: dict[int, str], wanted: str | None, name: str) -> int:
    """The index of the label that means toxic. Raises InputError unless exactly one does."""
    names = (wanted.lower(),) if wanted else TOXIC
    found = [index for index, label in labels.items() if label.lower() in names]
    if len(labels) == 1 and not wanted:
        return 0
    if len(found) != 1:
        told = ", ".join(labels.values())
        raise InputError(
            f"--classifier {name}: which of its labels means toxic? --toxic-label takes one of {told}"
        )
    return found[0]
