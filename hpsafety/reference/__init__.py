"""The oracle of every op: plain torch, any dtype and device, obvious, nothing in place.

`calls` counts the calls of each oracle, so that a test can prove that a backend never leans on it.
"""

import collections
import functools

from hpsafety.reference.adamw import adamw as _adamw
from hpsafety.reference.adamw import grad_norm_sq as _grad_norm_sq
from hpsafety.reference.attention import attention as _attention
from hpsafety.reference.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy
from hpsafety.reference.linear_logprob import linear_logprob as _linear_logprob
from hpsafety.reference.paged_attention import paged_attention as _paged_attention
from hpsafety.reference.rms_norm import rms_norm as _rms_norm
from hpsafety.reference.rope import rope as _rope
from hpsafety.reference.rope import rope_qkv as _rope_qkv
from hpsafety.reference.swiglu import swiglu as _swiglu

calls = collections.Counter()


def _counted(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return wrapper


linear_cross_entropy = _counted(_linear_cross_entropy)
linear_logprob = _counted(_linear_logprob)
paged_attention = _counted(_paged_attention)
rms_norm = _counted(_rms_norm)
rope = _counted(_rope)
rope_qkv = _counted(_rope_qkv)
swiglu = _counted(_swiglu)
adamw = _counted(_adamw)
grad_norm_sq = _counted(_grad_norm_sq)
attention = _counted(_attention)
