"""Which English documents an audit scores: a simple random sample, whose size is known after the first pass (AUD-4).

Each document has a key, drawn from the seed and its place. The sample is those of smallest key; the first pass counts
the keys in buckets, so that the second finds its documents without a list of them in memory.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

BUCKETS = 1 << 16


def sampling_key(seed: int, file: int, line: int) -> int:
    """64 bits for the document of that file number and line: uniform, and independent of its text."""
    digest = hashlib.blake2b(
        f"{seed}:{file}:{line}".encode(), digest_size=8, person=b"hpsafety-audit"
    ).digest()
    return int.from_bytes(digest, "big")


def bucket_of(key: int) -> int:
    return key // ((1 << 64) // BUCKETS)


@dataclass(frozen=True, slots=True)
class Sample:
    """Which English documents are scored: all of the buckets below `border`, and of `border` those of smallest key."""

    size: int
    border: int
    from_border: int

    def may_hold(self, key: int) -> bool:
        return bucket_of(key) <= self.border


def choose_sample(buckets: Counter, fraction: float) -> Sample:
    """A simple random sample of the documents counted in `buckets`: the round(fraction N) of smallest key (AUD-4)."""
    size = left = int(fraction * buckets.total() + 0.5)
    for bucket in sorted(buckets) if size else ():
        if left <= buckets[bucket]:
            return Sample(size, bucket, left)
        left -= buckets[bucket]
    return Sample(0, -1, 0)
