"""FlashAttention's own kernels, read the same way from the machine code of public wheels: causal, bf16, inner loop.

FA2 is xformers 0.0.26.post1 (CUDA 12.1), its variant for uneven lengths and an even head dim. FA3 is flash_attn_3 in
xformers 0.0.33.post2, without varlen. FA2's code for sm_90 cannot be read, so it has no rows there. What FA3 gains by
warps that only load, and by two groups of warps taking turns, does not show in counts.
"""

FA2, FA3 = "xformers 0.0.26.post1", "xformers 0.0.33.post2, flash_attn_3"
_COLUMNS = (
    "kernel", "arch", "direction", "head_dim", "tile", "warps", "registers", "spill", "loop_spill", "eq",
    "non_mma_per_eq", "mufu_per_eq", "ldsm", "bound", "tensor_use",
)  # fmt: skip
_TABLE = """
FA2 sm_80 forward  64  128x128 4 255 844 224 256 3.52 0.516 72  tensor 1
FA2 sm_80 forward  128 128x64  4 255 768 64  256 2.54 0.266 80  tensor 1
FA2 sm_80 forward  128 64x64   4 180 0   0   128 2.76 0.266 72  shared 0.87
FA2 sm_80 backward 64  128x128 8 255 124 40  320 3.07 0.2   144 shared 0.99
FA2 sm_80 backward 64  64x128  8 252 0   0   160 3.26 0.2   80  shared 0.89
FA2 sm_80 backward 128 64x128  8 255 100 28  320 2.07 0.1   144 tensor 1
FA3 sm_80 forward  128 128x128 8 255 464 64  256 3.06 0.258 128 shared 0.99
FA3 sm_90 forward  64  192x128 - 128 0   0   128 4.54 0.516 0   issue  0.86
FA3 sm_90 forward  128 128x128 - 168 0   0   256 2.41 0.258 0   tensor 1
FA3 sm_90 backward 64  128x128 - 168 120 0   320 2.40 0.2   0   tensor 1
FA3 sm_90 backward 128 64x128  - 168 8   0   320 1.48 0.1   0   tensor 1
"""


def _number(word: str):
    try:
        return float(word) if "." in word else int(word)
    except ValueError:
        return None if word == "-" else word


BASELINES = [
    dict(zip(_COLUMNS, map(_number, line.split()), strict=True))
    | {"source": FA2 if line.startswith("FA2") else FA3}
    for line in _TABLE.strip().splitlines()
]
