"""Oracle of rope: rotary position embedding in the rotate-half form of HF Llama, plain torch, any dtype."""

import torch


def rope(q, k, positions, cos, sin, inverse=False):
    """Rotates the pairs (i, i + K/2) of every head by the angle of the token's position.

    q          (T, H, K)
    k          (T, G, K)
    positions  (T,) integers, rows of the tables
    cos, sin   (max_pos, K/2)
    inverse    rotates back (the transpose, hence the backward)
    returns    q, k of the inputs' dtypes; the product is made in the wider of their dtype and the tables'
    """
    c = cos[positions.long()].unsqueeze(1)
    s = sin[positions.long()].unsqueeze(1)
    s = -s if inverse else s

    def rotate(x):
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def rope_qkv(qkv, positions, cos, sin):
    """Splits the fused projection, rotates q and k, hands v on.

    qkv      (T, G, J + 2, K): for each kv head its J query heads, its key head, its value head
    returns  q (T, G*J, K), k (T, G, K), v (T, G, K)
    """
    q, k = rope(qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], positions, cos, sin)
    return q, k, qkv[:, :, -1].clone()
