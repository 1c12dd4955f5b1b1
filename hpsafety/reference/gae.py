"""Oracle of gae: plain torch, any dtype, one token after the other."""

import torch


def gae(rewards, values, cu_responses, gamma=1.0, lam=0.95):
    """Generalised advantage estimation, each response for itself, from its last token back:

    delta_t = rewards_t + gamma values_{t+1} - values_t
    A_t = delta_t + gamma lam A_{t+1}
    with values and A past the response's end = 0

    rewards, values  (N,)
    cu_responses     (R+1,) offsets of the responses in N
    returns          advantages (N,), returns = advantages + values (N,); fp32 (fp64 for fp64 inputs), no gradient
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    r, v = rewards.detach().to(dtype), values.detach().to(dtype)
    zero, bounds, backwards = r.new_zeros(()), cu_responses.tolist(), []
    for start, end in reversed(list(zip(bounds, bounds[1:], strict=False))):
        advantage = next_value = zero
        for t in reversed(range(start, end)):
            advantage = r[t] + gamma * next_value - v[t] + gamma * lam * advantage
            next_value = v[t]
            backwards.append(advantage)
    advantages = torch.stack(backwards[::-1]) if backwards else r
    return advantages, advantages + v
