"""Run by test_static.py in a process without TRITON_INTERPRET: what needs real kernels. Prints one JSON object."""

import contextlib
import io
import json
import types

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from bench.static import __main__ as command
from bench.static import compile, launches, sass
from hpsafety.triton_kernels import launch

SCALE = tl.constexpr(2.0)


@triton.jit
def scaled(x):
    return x * SCALE


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["stride"])
def product(
    x_ptr, w_ptr, bias_ptr, out_ptr, rows, depth, stride, factor, on, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, 16)
    total = tl.zeros([16, 16], tl.float32)
    for k in range(0, depth, BLOCK):
        inner = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row[:, None] * stride + inner[None, :], mask=(row < rows)[:, None], other=0.0)
        total = tl.dot(x, tl.load(w_ptr + inner[:, None] * 16 + column[None, :]), total)
    if BIAS:
        total += tl.load(bias_ptr + column)[None, :]
    if on:
        total = scaled(total * factor)
    tl.store(out_ptr + row[:, None] * 16 + column[None, :], total, mask=(row < rows)[:, None])


class Driver:
    """Says that there is a GPU; nothing is loaded onto it."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

    def __init__(self, arch: int):
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)


def of_triton(arguments: tuple, constants: dict, arch: int) -> dict:
    """What triton.jit itself would compile for a launch: its own run(), stopped before the compiler."""
    seen = {}

    def hook(*, compile, **_):
        options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        seen.update(
            signature=compile["signature"],
            constants=compile["constants"],
            attributes=compile["configs"][0],
            **options,
        )
        return True

    product.device_caches.clear()
    triton.runtime.driver.set_active(Driver(arch))
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        product.run(
            *arguments, grid=(1,), warmup=True, num_warps=4, num_stages=2, enable_fp_fusion=True, **constants
        )
    return seen


def of_ours(arguments: tuple, constants: dict, arch: int):
    mode = FakeTensorMode()
    given = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
    with launch.record() as seen:
        launch.launch(product, 1, *given, num_warps=4, num_stages=2, **constants)
    return launches.specialise(seen[0], arch)


def specialisations() -> list[str]:
    """Where ours and triton.jit's differ; tensors and numbers of every kind it tells apart."""
    base, half = torch.zeros(64, dtype=torch.float32), torch.zeros(64, dtype=torch.bfloat16)
    out, faults = base, []
    for x, bias, flag, rows, depth, stride in (
        (half, base, True, 16, 32, 32),
        (half[1:], None, False, 1, 1, 1),
        (half[8:], base[1:], True, 17, 17, 17),
        (half, None, 1, 2**31, 2**31 + 16, 2**40),
        (half[4:], base[4:], 16, 0, 0, 0),
        (half, None, False, -1, -16, 2**63 - 1),
    ):
        constants = {"BIAS": bias is not None, "BLOCK": 16}
        arguments = (x, half, bias, out, rows, depth, stride, 0.5, flag)
        for arch in (80, 90):
            theirs, ours = of_triton(arguments, constants, arch), of_ours(arguments, constants, arch)
            same = types.SimpleNamespace(**theirs)
            pairs = [
                (same.signature, ours.signature), (same.constants, ours.constants), (same.attributes, ours.attributes),
                (same.num_warps, ours.options["num_warps"]), (same.num_stages, ours.options["num_stages"]),
                (same.enable_fp_fusion, ours.options["enable_fp_fusion"]),
            ]  # fmt: skip
            faults += [f"triton {a}, here {b}" for a, b in pairs if a != b]
    return faults


def compiled() -> dict:
    """The figures of `product`, made by both compilers: of sm_80 whole, of sm_90 the hash alone."""
    half, base = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64)
    constants = {"BIAS": False, "BLOCK": 16}
    ours = of_ours((half, half, None, base, 16, 64, 64, 1.0, True), constants, 80)
    cubin, shared = compile.build(ours)
    return {
        "figures": sass.profile(cubin, 80, 4, shared),
        "source": launches.source(product),
        "hashes": [ours.hash, of_ours((half, half, None, base, 9, 64, 64, 1.0, True), constants, 80).hash,
                   of_ours((half, half, None, base, 16, 64, 64, 1.0, True), constants, 90).hash,
                   of_ours((half, half, None, base, 16, 65, 64, 1.0, True), constants, 80).hash],
    }  # fmt: skip


def main() -> None:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = command.main(["--stale"])
    print(json.dumps({"specialisations": specialisations(), "stale": [code, text.getvalue()], **compiled()}))


if __name__ == "__main__":
    main()
