"""Oracle of swiglu: plain torch, any dtype."""

import torch


def swiglu(gate_up):
    """y = silu(gate) * up.

    gate_up  (T, 2F): the first F columns are the gate
    returns  (T, F)
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
