"""The public ops: contract, checks, autograd and choice of backend, one file per op."""

from hpsafety.ops.accumulate import accumulate_
from hpsafety.ops.adamw import adamw_, grad_norm_sq
from hpsafety.ops.attention import attention
from hpsafety.ops.backends import BackendUnavailable
from hpsafety.ops.distill_loss import distill_loss
from hpsafety.ops.gae import gae
from hpsafety.ops.linear_cross_entropy import linear_cross_entropy
from hpsafety.ops.linear_logprob import linear_logprob
from hpsafety.ops.paged_attention import paged_attention
from hpsafety.ops.pair_loss import pair_loss
from hpsafety.ops.ppo_loss import PPOLoss, ppo_loss
from hpsafety.ops.reward_score import RewardScore, reward_score
from hpsafety.ops.rms_norm import rms_norm
from hpsafety.ops.rope import rope, rope_, rope_qkv
from hpsafety.ops.sample import sample
from hpsafety.ops.swiglu import swiglu
from hpsafety.ops.table import table

__all__ = [
    "BackendUnavailable",
    "PPOLoss",
    "RewardScore",
    "accumulate_",
    "adamw_",
    "attention",
    "distill_loss",
    "gae",
    "grad_norm_sq",
    "linear_cross_entropy",
    "linear_logprob",
    "paged_attention",
    "pair_loss",
    "ppo_loss",
    "reward_score",
    "rms_norm",
    "rope",
    "rope_",
    "rope_qkv",
    "sample",
    "swiglu",
    "table",
]
