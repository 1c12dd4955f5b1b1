"""What a sampled token was worth: PPO's estimators, as functions of one iteration's scores and KL penalties.

Scores are whitened over the whole batch first, whatever the estimator (PPO-3). The KL to the start enters as a reward
of every token, -kl_coef (logp - logp_start); it is never whitened and never divided by a group's spread, so that
kl_coef weighs the same in a group of like answers as in one of unlike ones.

gae    needs a critic: ops.gae of the tokens' rewards, the score standing at the last token (spec section 5).
group  no critic (GRPO, Shao et al. 2024): all tokens of a sample have its score less its group's mean, over the group's
       population std; exact zeros where the group's scores are equal.
rloo   no critic (Ahmadian et al. 2024): its score less the mean of the group's other samples.
group and rloo add the penalties from the token on, less their mean at the same place of the group's other samples: what
a token cannot have caused, and what any sample would have paid, is noise.

G groups of k samples, R = G k responses, N sampled tokens in canonical order (group, response, token).
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

CONTROLLER_STEP = (
    0.1  # of --adaptive-kl: at most 0.2 of this, 2 %, an iteration (Ziegler et al. 2019, section 2.2)
)


def whiten(scores: torch.Tensor) -> torch.Tensor:
    """(scores - mean) / (std + 1e-8) in fp64, population std (PPO-3): (R,) fp32; exact zeros where all are equal."""
    wide = scores.double()
    if bool((wide == wide[0]).all()):
        return torch.zeros_like(scores)
    return ((wide - wide.mean()) / (wide.std(correction=0) + 1e-8)).to(scores.dtype)


def group_relative(scores: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """(R,) fp32: each score less its group's mean, over the group's population std + 1e-8; exact zeros where equal.

    sizes  (G,) responses of each group
    """
    return torch.cat([whiten(own) for own in scores.split(list(sizes))])


def leave_one_out(scores: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """(R,) fp32: each score less the mean of its group's others, in fp64; exact zeros where equal. sizes: all >= 2."""
    wide = scores.double().split(list(sizes))
    return torch.cat([own - (own.sum() - own) / (len(own) - 1) for own in wide]).to(scores.dtype)


def penalties_to_go(penalties: torch.Tensor, lengths: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """(N,) fp32: each token's penalties from itself to its sample's end, less the mean of the same sums of the group's
    other samples at the same place (0 where one has ended).

    penalties  (N,); lengths: (R,) tokens of each response; sizes: (G,) responses of each group, all >= 2
    """
    sums = [own.flip(0).cumsum(0).flip(0) for own in penalties.double().split(list(lengths))]
    out, at = [], 0
    for size in sizes:
        table = pad_sequence(sums[at : at + size], batch_first=True)  # (k, longest)
        centred = table - (table.sum(0) - table) / (size - 1)
        out += [row[:length] for row, length in zip(centred, lengths[at : at + size], strict=True)]
        at += size
    return torch.cat(out).to(penalties.dtype)


def without_critic(
    estimator: str,
    scores: torch.Tensor,
    penalties: torch.Tensor,
    lengths: Sequence[int],
    sizes: Sequence[int],
) -> torch.Tensor:
    """(N,) fp32 advantages by `estimator`, group or rloo; arguments as above, scores whitened over the batch."""
    relative = group_relative if estimator == "group" else leave_one_out
    of_tokens = torch.repeat_interleave(relative(scores, sizes), torch.tensor(lengths))
    return of_tokens + penalties_to_go(penalties, lengths, sizes)


def adapted(kl_coef: float, kl: float, target: float) -> float:
    """The next iteration's KL coefficient: kl_coef (1 + 0.1 clip(kl / target - 1, -0.2, 0.2)).

    The proportional controller of Ziegler et al. 2019 (section 2.2), on nats per token instead of per sample.
    kl, target  nats per sampled token: this iteration's, and the one wanted
    """
    return kl_coef * (1 + CONTROLLER_STEP * min(max(kl / target - 1, -0.2), 0.2))
