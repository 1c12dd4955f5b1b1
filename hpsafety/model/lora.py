"""Low-rank adapters on the four products of every block, beside weights that stay frozen (Hu et al. 2021).

A weight W (O, I) computes as W + s up down, with down (r, I) drawn and up (O, r) zero at first, so that a model with
fresh adapters has the bits of the one without. s is SCALE for every rank (alpha = 2 r). Several models may stand on one
trunk: the very same parameters, each model with adapters of its own, or with none.

Legend: O outputs, I inputs, r rank.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hpsafety.model.gemm import Adapter
from hpsafety.model.llama import Llama, Trunk

SCALE = 2.0
ADAPTED = ("qkv", "o", "gate_up", "down")


class LowRank(nn.Module):
    """One weight's adapter, in the weight's dtype."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        inputs = weight.shape[-1]
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.down = nn.Parameter(down.to(weight.device, weight.dtype))
        self.up = nn.Parameter(weight.new_zeros(weight.numel() // inputs, rank))

    def adapter(self) -> Adapter:
        return Adapter(self.down, self.up, SCALE)


def add_adapters(model: Trunk, rank: int, seed: int) -> None:
    """Freezes the model's blocks, embedding, norm and token head and gives every block fresh adapters; a head of one
    number still trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("value", "score"))
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        block.lora = nn.ModuleDict({n: LowRank(getattr(block, n), rank, generator) for n in ADAPTED})


def without_adapters(model: Llama) -> Llama:
    """The frozen model below the adapters: the same parameters, no copy."""
    with torch.device("meta"):
        plain = Llama(model.config, model.tokenizer, model.generation).requires_grad_(False)
    plain.load_state_dict(dict(trunk_parameters(model)), assign=True)
    return plain


def trunk_parameters(model: Trunk) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all but the adapters."""
    return ((name, p) for name, p in model.named_parameters() if ".lora." not in name)


def num_parameters(config, rank: int) -> int:
    """Parameters of one set of adapters on a model of this config."""
    c = config
    heads = c.num_heads * c.head_dim
    qkv = heads + 2 * c.num_kv_heads * c.head_dim
    sizes = (c.width + qkv, heads + c.width, c.width + 2 * c.mlp_width, c.mlp_width + c.width)
    return c.num_layers * rank * sum(sizes)


class Merged(Mapping):
    """The parameters as one model without adapters: name -> W + s up down, made when it is asked for, on the CPU in
    fp32 also where the trunk is bf16, since an adapter's changes may be smaller than bf16 tells apart."""

    def __init__(self, model: Llama):
        self.parts = dict(trunk_parameters(model))
        self.adapters = {
            f"blocks.{i}.{name}": part for i, b in enumerate(model.blocks) for name, part in b.lora.items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.parts[name].detach().float().cpu()
        if name not in self.adapters:
            return weight
        part = self.adapters[name]
        change = part.up.detach().float().cpu() @ part.down.detach().float().cpu()
        return torch.add(weight, change.view(weight.shape), alpha=SCALE)

    def __iter__(self):
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)
