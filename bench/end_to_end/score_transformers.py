"""transformers' sequence classifiers on padded batches of responses, sorted by length over the whole data.

The classifier finds a response's last token by the pad id, so that no mask is needed. In bf16 the weights are bf16 too.
"""

import torch
from transformers import AutoModelForSequenceClassification

from bench.end_to_end.common import Group, Run, Settings, rows, timed_scores
from bench.end_to_end.padded import micro_batches, right_padded


def load(settings: Settings) -> list:
    """Both classifiers, frozen."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return [
        AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        for path in settings.reward_models
    ]


@torch.inference_mode()
def scores_of(models: list, texts: list[list[int]], tokens_per_batch: int) -> torch.Tensor:
    """(models, texts) fp32: each classifier's score of each text's last token."""
    out = torch.zeros(len(models), len(texts))
    for batch in micro_batches(list(enumerate(texts)), _length, tokens_per_batch):
        places = [place for place, _ in batch]
        for m, model in enumerate(models):
            tokens = right_padded([text for _, text in batch], model.config.pad_token_id)
            out[m, places] = model(input_ids=tokens, use_cache=False).logits[:, 0].float()
    return out


def run(settings: Settings) -> Run:
    models = load(settings)

    def score(groups: list[Group]) -> list[float]:
        texts = [prompt + response for prompt, response in rows(groups)]
        return scores_of(models, texts, settings.peer_tokens_per_batch).flatten().tolist()

    return timed_scores(
        score, settings, "LlamaForSequenceClassification, length-sorted padded batches, maskless sdpa"
    )


def _length(item: tuple[int, list[int]]) -> int:
    return len(item[1])
