"""The oracle of every op: plain torch, any dtype and device, obvious, nothing in place.

`calls` counts the calls of each oracle, so that a test can prove that a backend never leans on it.
"""

import collections
import functools

from hpsafety.reference.accumulate import accumulate as _accumulate
from hpsafety.reference.adamw import adamw as _adamw
from hpsafety.reference.adamw import grad_norm_sq as _grad_norm_sq
from hpsafety.reference.attention import attention as _attention
from hpsafety.reference.distill_loss import distill_loss as _distill_loss
from hpsafety.reference.gae import gae as _gae
from hpsafety.reference.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy
from hpsafety.reference.linear_logprob import linear_logprob as _linear_logprob
from hpsafety.reference.paged_attention import paged_attention as _paged_attention
from hpsafety.reference.pair_loss import pair_loss as _pair_loss
from hpsafety.reference.ppo_loss import ppo_loss as _ppo_loss
from hpsafety.reference.reward_score import reward_score as _reward_score
from hpsafety.reference.rms_norm import rms_norm as _rms_norm
from hpsafety.reference.rope import rope as _rope
from hpsafety.reference.rope import rope_qkv as _rope_qkv
from hpsafety.reference.sample import sample as _sample
from hpsafety.reference.swiglu import swiglu as _swiglu

calls = collections.Counter()


def _counted(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return wrapper


gae = _counted(_gae)
distill_loss = _counted(_distill_loss)
accumulate = _counted(_accumulate)
linear_cross_entropy = _counted(_linear_cross_entropy)
linear_logprob = _counted(_linear_logprob)
pair_loss = _counted(_pair_loss)
ppo_loss = _counted(_ppo_loss)
reward_score = _counted(_reward_score)
paged_attention = _counted(_paged_attention)
rms_norm = _counted(_rms_norm)
rope = _counted(_rope)
rope_qkv = _counted(_rope_qkv)
sample = _counted(_sample)
swiglu = _counted(_swiglu)
adamw = _counted(_adamw)
grad_norm_sq = _counted(_grad_norm_sq)
attention = _counted(_attention)
