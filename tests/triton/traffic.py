"""Bytes that the Triton kernels read and write, against the least that any could: python -m tests.triton.traffic.

Seen in the interpreter by the auditor, on small shapes. `least` reads each input's used bytes once and writes each
result once, what backward needs among them. `moved` adds work space: what leaves the chip if its caches hold what is
read again. `issued` counts every lane's bytes as the programs ask for them: weights of a norm once a program, and tiles
of a product as often as its tiling says. Attention's table of tiles, 16 bytes each, is not among them.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402  the variable comes first

from hpsafety import ops  # noqa: E402
from tests.ops import (  # noqa: E402
    test_attention,
    test_distill_loss,
    test_gae,
    test_linear_cross_entropy,
    test_linear_logprob,
    test_paged_attention,
    test_pair_loss,
    test_ppo_loss,
    test_reward_score,
    test_rms_norm,
    test_rope,
    test_sample,
    test_swiglu,
)
from tests.triton.audit import audit  # noqa: E402

BF16 = torch.bfloat16
ALONE = test_attention.plain(*[96] * 5)
SHARED = test_attention.grouped((64, 32, 32, 32, 32))  # one prompt, four responses: 192 rows
COPIED = test_attention.plain(96, 96, 96, 96)  # the same as four sequences of their own: 384 rows


def attention_of(segments):
    return ops.attention, test_attention.make_inputs(segments, 4, 2, 64, BF16)


def sample_of():
    logits, seeds, positions = test_sample.make_inputs(4, 8192)
    return (lambda **given: ops.sample(temperature=0.8, top_p=1.0, top_k=0, **given)), {
        "logits": logits, "seeds": seeds, "positions": positions,
    }  # fmt: skip


def paged_of(prefix):
    """Eight sequences with 56 tokens of their own after 200 of a shared prompt, or with 256 of their own."""
    lengths = [56] * 8 if prefix else [256] * 8
    args = test_paged_attention.make_inputs(lengths, 16, 8, 2, 64, BF16, prefix=prefix)
    table = args.pop("prefix", None)
    if table is None:
        return ops.paged_attention, args
    names = ("prefix_table", "prefix_lens", "group_of")

    def call(impl, prefix_table, prefix_lens, group_of, **given):
        return ops.paged_attention(prefix=(prefix_table, prefix_lens, group_of), impl=impl, **given)

    return call, args | dict(zip(names, table, strict=True))


CASES = {
    "rms_norm": lambda: (ops.rms_norm, test_rms_norm.make_inputs(96, 1024, BF16)),
    "rms_norm + residual": lambda: (ops.rms_norm, test_rms_norm.make_inputs(96, 1024, BF16, residual=True)),
    "rope": lambda: (ops.rope, test_rope.make_inputs(64, 8, 2, 64, BF16)),
    "swiglu": lambda: (ops.swiglu, test_swiglu.make_inputs(32, 2048, BF16)),
    "ppo_loss": lambda: (ops.ppo_loss, test_ppo_loss.make_inputs(8192)),
    "gae": lambda: (ops.gae, test_gae.make_inputs([512, 300, 700])),
    "pair_loss": lambda: (ops.pair_loss, test_pair_loss.make_inputs(1024)),
    "reward_score": lambda: (ops.reward_score, test_reward_score.make_inputs([4] * 8, 1024, 1024, 400, BF16)),
    "sample": lambda: sample_of(),
    "paged_attention, 8 own contexts": lambda: paged_of(None),
    "paged_attention, prompt shared by 8": lambda: paged_of(((200,), (0,) * 8)),
    "linear_logprob": lambda: (ops.linear_logprob, test_linear_logprob.make_inputs(128, 128, 2048, BF16)),
    "linear_cross_entropy": lambda: (
        ops.linear_cross_entropy,
        test_linear_cross_entropy.make_inputs(128, 128, 2048, BF16),
    ),
    "distill_loss": lambda: (ops.distill_loss, test_distill_loss.make_inputs(128, 128, 64, 2048, BF16)),
    "attention, five sequences": lambda: attention_of(ALONE),
    "attention, prompt shared by 4": lambda: attention_of(SHARED),
    "attention, prompt copied 4 times": lambda: attention_of(COPIED),
}


def measure(function, args: dict) -> tuple[int, int, int]:
    """(issued, moved, least) bytes of one forward call."""
    tensors = {name: x for name, x in args.items() if isinstance(x, torch.Tensor)}
    with torch.no_grad(), audit(**tensors) as seen:
        function(**args, impl="triton")
    traffic = seen.traffic
    issued = sum(t.load_bytes + t.store_bytes for t in traffic.values())
    moved = sum(t.load_unique + t.store_unique for t in traffic.values())
    given = sum(t.load_unique for name, t in traffic.items() if name in tensors)
    results = sum(t.store_unique for name, t in traffic.items() if name not in tensors and not t.load_bytes)
    return issued, moved, given + results


def main() -> None:
    print("| kernel | least, bytes | moved | of the least | issued |\n|---|---|---|---|---|")
    for name, make in CASES.items():
        issued, moved, least = measure(*make())
        print(f"| {name} | {least:,} | {moved:,} | {moved / least:.3f} | {issued:,} |", flush=True)


if __name__ == "__main__":
    main()
