"""A tiny random model and groups for tests of what is built on them."""

import torch

from hpsafety.data.groups import PromptGroup
from hpsafety.model.config import LlamaConfig
from hpsafety.model.llama import Llama, init_weights


def tiny_config(**changes) -> LlamaConfig:
    values = {
        "vocab_size": 67, "width": 24, "mlp_width": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 6, "max_positions": 128, "norm_eps": 1e-5, "rope_theta": 10_000.0, "rope_scaling": None,
        "tied": True, "qkv_bias": False, "o_bias": False, "mlp_bias": False, "model_type": "llama", "init_std": 0.2,
    }  # fmt: skip
    return LlamaConfig(**(values | changes))


def tiny_model(seed: int = 0, dtype=torch.float32, **changes) -> Llama:
    return init_weights(Llama(tiny_config(**changes)), seed).to(dtype)


def random_groups(
    count: int, k: int = 1, seed: int = 0, vocab: int = 67, longest: int = 20
) -> list[PromptGroup]:
    """Groups with ragged prompts and k ragged responses each."""
    g = torch.Generator().manual_seed(seed)

    def tokens(low):
        n = int(torch.randint(low, longest + 1, (1,), generator=g))
        return torch.randint(0, vocab, (n,), generator=g).tolist()

    return [PromptGroup(prompt=tokens(1), responses=[tokens(1) for _ in range(k)]) for _ in range(count)]
