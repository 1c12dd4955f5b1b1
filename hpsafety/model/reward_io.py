"""Reward models in and out: Hugging Face directories of a sequence classifier with one label.

transformers reads a classifier's score at the last token that is not pad. A reward is read at the end-of-turn token,
and in chat models the pad is often that very token: the saved model therefore pads with another one.
"""

import torch

from hpsafety.errors import file_error
from hpsafety.model.heads import RewardModel
from hpsafety.model.io import locate, read_directory, save_state
from hpsafety.model.jsonfile import read_json
from hpsafety.model.tokenizer import Tokenizer

SCORE = "score.weight"


def load_reward_model(path, dtype: torch.dtype = torch.float32, device="cpu") -> RewardModel:
    """A reward model from a directory that `hpsafety reward` or transformers' sequence classifiers wrote.

    Raises InputError as load_model does, for a model without a reward head, and for one with several labels.
    """
    directory = locate(path)
    if not directory.is_dir():
        raise file_error(directory, "expected the directory of a reward model, as hpsafety reward writes it")
    fields = read_json(directory / "config.json")
    labels = len(fields.get("id2label") or {"0": "reward"})
    if labels != 1:
        raise file_error(directory / "config.json", f"a reward model has one label, this one has {labels}")
    config, tokenizer, generation, state, extra = read_directory(directory, dtype, device, extra=(SCORE,))
    if SCORE not in extra:
        raise file_error(
            directory, f"holds no reward head (tensor {SCORE!r}); give a model made by hpsafety reward"
        )
    if tuple(extra[SCORE].shape) != (1, config.width):
        shape = tuple(extra[SCORE].shape)
        raise file_error(directory, f"tensor {SCORE!r} has shape {shape}, expected {(1, config.width)}")
    with torch.device("meta"):
        model = RewardModel(config, tokenizer, generation)
    model.load_state_dict(state | {"score": extra[SCORE]}, assign=True)
    return model


def save_reward_state(
    config, tensors: dict[str, torch.Tensor], tokenizer: Tokenizer | None, generation: dict, directory
) -> None:
    """Write a reward model that transformers loads as LlamaForSequenceClassification (or Qwen2's).

    tensors  names and shapes of RewardModel(config).state_dict(): there is no token head (RM-4)
    """
    tensors = dict(tensors)
    score = tensors.pop("score")
    kind = "Qwen2" if config.model_type == "qwen2" else "Llama"
    overrides = {
        "architectures": [f"{kind}ForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "num_labels": 1,
        "problem_type": "regression",
    }
    if tokenizer is not None:
        pad = _pad_id(tokenizer)
        tokenizer = tokenizer.with_pad(pad)
        generation = generation | {"pad_token_id": pad}
    save_state(config, tensors, tokenizer, generation, directory, extra={SCORE: score}, overrides=overrides)


def save_reward_model(model: RewardModel, directory) -> None:
    """save_reward_state of a model that is whole on this process."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    save_reward_state(model.config, state, model.tokenizer, model.generation, directory)


def _pad_id(tokenizer: Tokenizer) -> int:
    """The model's pad where it never ends a response, else its lowest special token that does not."""
    ends = {tokenizer.end_of_turn_id, *tokenizer.stop_ids}
    if tokenizer.pad_id is not None and tokenizer.pad_id not in ends:
        return tokenizer.pad_id
    others = sorted(tokenizer.special_ids - ends)
    return others[0] if others else next(i for i in range(len(tokenizer)) if i not in ends)
