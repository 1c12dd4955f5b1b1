"""Hugging Face's tensor names and where each lives in our fused weights; the same table loads and saves.

Legend: G kv heads, J query heads per kv head, K head dim, D width, F mlp width, V vocabulary.
"""

from typing import NamedTuple

import torch

from hpsafety.model.config import LlamaConfig


class Place(NamedTuple):
    """Where a Hugging Face tensor of `shape` lives: parameter[index], reshaped."""

    parameter: str
    index: tuple
    shape: tuple[int, ...]


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of Llama(config), in its state_dict's names."""
    c = config
    v, d, f, g, k = c.vocab_size, c.width, c.mlp_width, c.num_kv_heads, c.head_dim
    rows = c.num_heads // g + 2
    layer = {"attn_norm": (d,), "qkv": (g, rows, k, d), "o": (d, c.num_heads * k)}
    layer |= {"mlp_norm": (d,), "gate_up": (2, f, d), "down": (d, f)}
    layer |= {"qkv_bias": (g, rows, k)} if c.qkv_bias else {}
    layer |= {"o_bias": (d,)} if c.o_bias else {}
    layer |= {"gate_up_bias": (2, f), "down_bias": (d,)} if c.mlp_bias else {}
    shapes = {"embed": (v, d), "norm": (d,)} | ({} if c.tied else {"head": (v, d)})
    return shapes | {
        f"blocks.{i}.{name}": shape for i in range(c.num_layers) for name, shape in layer.items()
    }


def hf_names(config: LlamaConfig) -> dict[str, Place]:
    """Hugging Face name -> Place. A head group's rows of qkv are its J query heads, then its key, then its value."""
    c = config
    h, g, k, f, d = c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_width, c.width
    j = h // g
    every = slice(None)
    # suffix in a layer -> (our parameter, index into it, output rows, input columns or None for no matrix)
    parts = {
        "self_attn.q_proj": ("qkv", (every, slice(0, j)), h * k, d, c.qkv_bias),
        "self_attn.k_proj": ("qkv", (every, j), g * k, d, c.qkv_bias),
        "self_attn.v_proj": ("qkv", (every, j + 1), g * k, d, c.qkv_bias),
        "self_attn.o_proj": ("o", (), d, h * k, c.o_bias),
        "mlp.gate_proj": ("gate_up", (0,), f, d, c.mlp_bias),
        "mlp.up_proj": ("gate_up", (1,), f, d, c.mlp_bias),
        "mlp.down_proj": ("down", (), d, f, c.mlp_bias),
    }
    names = {"model.embed_tokens.weight": Place("embed", (), (c.vocab_size, d))}
    for i in range(c.num_layers):
        outer, inner = f"model.layers.{i}", f"blocks.{i}"
        names[f"{outer}.input_layernorm.weight"] = Place(f"{inner}.attn_norm", (), (d,))
        names[f"{outer}.post_attention_layernorm.weight"] = Place(f"{inner}.mlp_norm", (), (d,))
        for suffix, (ours, index, rows, columns, bias) in parts.items():
            names[f"{outer}.{suffix}.weight"] = Place(f"{inner}.{ours}", index, (rows, columns))
            if bias:
                names[f"{outer}.{suffix}.bias"] = Place(f"{inner}.{ours}_bias", index, (rows,))
    names["model.norm.weight"] = Place("norm", (), (d,))
    if not c.tied:
        names["lm_head.weight"] = Place("head", (), (c.vocab_size, d))
    return names


def split(parameter: torch.Tensor, place: Place) -> torch.Tensor:
    """The Hugging Face tensor that lives at `place` of our parameter; a copy only where rows are not in order."""
    return parameter[place.index].reshape(place.shape)


def fuse(parameter: torch.Tensor, place: Place, tensor: torch.Tensor) -> None:
    """Write a Hugging Face tensor to its place in our parameter, converting dtype and device."""
    target = parameter[place.index]
    target.copy_(tensor.view(target.shape))
