"""A tiny chat model on disk, with a tokenizer that needs no download."""

import json

import pytest

from hpsafety.model.heads import reward_model_from
from hpsafety.model.io import load_model, save_model
from hpsafety.model.reward_io import save_reward_model
from tests.tiny import tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer():
    """A character-level chat tokenizer of 67 ids."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    special = ["<|im_start|>", "<|im_end|>"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789 \nABCDEFGHIJKLM.,?!'")
    vocab = {token: i for i, token in enumerate([*special, *letters][:67])}
    backend = Backend(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    return backend


def write_tokenizer(folder) -> None:
    """Adds the tiny tokenizer to a saved model."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_chat_model(folder, **settings) -> str:
    """A tiny chat model (tests/tiny.py's settings) in a folder; its path."""
    save_model(tiny_model(**settings), str(folder))
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny", seed=2)


@pytest.fixture(scope="session")
def judges(model_dir, tmp_path_factory):
    """A folder of reward models on the tiny model, with fresh heads: safety, helpful and newer."""
    folder = tmp_path_factory.mktemp("judges")
    for seed, name in enumerate(("safety", "helpful", "newer")):
        save_reward_model(reward_model_from(load_model(model_dir), seed=seed + 5), folder / name)
    return folder
