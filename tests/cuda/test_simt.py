"""The emulation itself: right kernels pass in every mode, and each planted fault is found and named by one of them."""

import pytest

from tests.cuda import emulation, programs

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs a C++ compiler: apt install g++")

NUMBERS = "alignas(16) static float numbers[256]; const float* in = numbers;"
HEAD = '#include "device.cuh"\n#include <cstdio>\n'


def program(kernel: str, main: str, grid=1, block=64, shared=1024, arguments="out") -> str:
    """A kernel k(float* out), and what main says of its 256 floats afterwards."""
    launch = f"SIMT_LAUNCH((k), dim3({grid}), dim3({block}), {shared}, nullptr, {arguments});"
    body = f"std::vector<float> store(256, -1.f); float* out = store.data(); {main.replace('LAUNCH', launch)} return 0;"
    return f"{HEAD}{kernel}\nint main() {{ {body} }}"


def global_kernel(body: str, parameters="float* out") -> str:
    return f"__global__ void k({parameters}) {{ {body} }}"


RIGHT = {
    "neighbours through shared memory": program(
        global_kernel(
            "SIMT_SHARED(float, s); s[threadIdx.x] = threadIdx.x; __syncthreads();"
            "out[threadIdx.x] = s[(threadIdx.x + 1) % 64];"
        ),
        "LAUNCH for (int i = 0; i < 64; i++) if (out[i] != (i + 1) % 64) return 1;",
    ),
    "a warp's sum": program(
        global_kernel(
            "float v = threadIdx.x; for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);"
            "out[threadIdx.x] = v;"
        ),
        "LAUNCH if (out[0] != 496 || out[63] != 1520) return 1;",
    ),
    "half a warp, and 64-bit values": program(
        global_kernel(
            "double v = threadIdx.x * 0.5; if (threadIdx.x < 16) v = __shfl_up_sync(0xffffu, v, 1);"
            "out[threadIdx.x] = v;"
        ),
        "LAUNCH if (out[0] != 0 || out[5] != 2 || out[20] != 10) return 1;",
    ),
    "threads that leave early": program(
        global_kernel(
            "SIMT_SHARED(float, s); if (threadIdx.x >= 40) return; s[threadIdx.x] = 1; __syncthreads();"
            "out[threadIdx.x] = s[39 - threadIdx.x];"
        ),
        "LAUNCH if (out[0] != 1 || out[39] != 1 || out[40] != -1) return 1;",
    ),
    "asynchronous copies": program(
        global_kernel(
            "SIMT_SHARED(float, s); cp_async16(s + 4 * threadIdx.x, in + 4 * threadIdx.x, threadIdx.x != 1);"
            "cp_async_commit(); cp_async_wait<0>(); __syncthreads();"
            "out[threadIdx.x] = s[63 - threadIdx.x];",
            "const float* in, float* out",
        ),
        f"{NUMBERS} for (int i = 0; i < 256; i++) numbers[i] = i; LAUNCH"
        " if (out[0] != 63 || out[63 - 4] != 0 || out[63 - 8] != 8) return 1;",
        arguments="in, out",
    ),
}
FAULTS = {  # name -> (program, the modes that must find it, what they say)
    "no __syncwarp between a lane's write and another's read": (
        program(
            global_kernel(
                "SIMT_SHARED(float, s); s[threadIdx.x] = threadIdx.x; float x = __shfl_xor_sync(~0u, 1.f, 1);"
                "out[threadIdx.x] = s[threadIdx.x ^ 1] + x;"
            ),
            "LAUNCH",
            block=32,
        ),
        {"tsan": "data race"},
    ),
    "no barrier": (
        program(
            global_kernel(
                "SIMT_SHARED(float, s); s[threadIdx.x] = 1; out[threadIdx.x] = s[(threadIdx.x + 1) % 64];"
            ),
            'LAUNCH for (int i = 0; i < 64; i++) if (out[i] != 1) { puts("wrong"); return 1; }',
        ),
        {"fibers": "wrong", "tsan": "data race"},
    ),
    "a barrier in two branches": (
        program(global_kernel("if (threadIdx.x < 32)\n__syncthreads();\nelse\n__syncthreads();"), "LAUNCH"),
        {"fibers": "reached from lines", "tsan": "reached from lines"},
    ),
    "a barrier that half the block never reaches": (
        program(
            global_kernel(
                "if (threadIdx.x < 32) __syncthreads(); else while (__shfl_sync(1u, 0, 0) == 0 && threadIdx.x < 1) {}"
            ),
            "LAUNCH",
        ),
        {"fibers": "the calling lane is not in the mask"},
    ),
    "a shuffle that 20 of 32 lanes reach": (
        program(
            global_kernel("if (threadIdx.x < 20) out[threadIdx.x] = __shfl_sync(~0u, 1.f, 0);"),
            "LAUNCH",
            block=32,
        ),
        {"fibers": "20 threads wait at"},
    ),
    "a shuffle from a lane outside of the mask": (
        program(
            global_kernel("if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 20);"),
            "LAUNCH",
            block=32,
        ),
        {"fibers": "reads lane 20"},
    ),
    "shared memory past its end": (
        program(global_kernel("SIMT_SHARED(float, s); s[256 + threadIdx.x] = 1;"), "LAUNCH"),
        {"asan": "heap-buffer-overflow"},
    ),
    "a tensor past its end": (
        program(global_kernel("out[256 + threadIdx.x] = 1;"), "LAUNCH"),
        {"asan": "heap-buffer-overflow"},
    ),
    "shared memory that nobody wrote": (
        program(
            global_kernel("SIMT_SHARED(float, s); out[threadIdx.x] = s[threadIdx.x] * 0;"),
            'LAUNCH if (!(out[3] == 0)) { puts("poison"); return 1; }',
        ),
        {"fibers": "poison"},
    ),
    "the same, in a template": (
        HEAD
        + "template <class T> __global__ void k(T* out) { SIMT_SHARED(T, s); out[threadIdx.x] = s[threadIdx.x]; }"
        "int main() { std::vector<float> store(64); float* out = store.data();"
        "SIMT_LAUNCH((k<float>), dim3(1), dim3(64), 256, nullptr, out);"
        'if (!(out[3] == 0)) { puts("poison"); return 1; } return 0; }',
        {"fibers": "poison"},
    ),
    "a copy that is not waited for": (
        program(
            global_kernel(
                "SIMT_SHARED(float, s); cp_async16(s + 4 * threadIdx.x, in + 4 * threadIdx.x); cp_async_commit();"
                "__syncthreads(); out[threadIdx.x] = s[threadIdx.x];",
                "const float* in, float* out",
            ),
            NUMBERS + ' LAUNCH if (!(out[0] == 0)) { puts("early"); return 1; }',
            arguments="in, out",
        ),
        {"fibers": "early"},
    ),
    "two blocks add to one place": (
        program(
            global_kernel("if (threadIdx.x == 0) out[0] += 1;"),
            'simt::watch(out, 1024, "out"); LAUNCH return simt::conflicts;',
            grid=2,
        ),
        {"fibers": "blocks 0 and 1 both wrote out at byte"},
    ),
    "two blocks write the same value to one place": (
        program(
            global_kernel("out[0] = 7;"),
            'simt::watch(out, 1024, "out", true); LAUNCH simt::end_watch();'
            "if (out[0] != 7 || out[1] != -1) return 9; return simt::conflicts;",
            grid=2,
        ),
        {"fibers": "blocks 0 and 1 both wrote out at byte 0"},
    ),
    "a misaligned matrix row": (
        program(
            global_kernel(
                "SIMT_SHARED(char, s); uint32_t r[4]; ldmatrix_x4(r, s + 8); out[threadIdx.x] = r[0];"
            ),
            "LAUNCH",
            block=32,
        ),
        {"fibers": "not 16-byte aligned"},
    ),
}


def together(texts: list[str]) -> str:
    """One program of many, of which the first argument chooses: a compilation takes seconds."""
    out = HEAD
    for i, text in enumerate(texts):
        body = text.removeprefix(HEAD).replace("int main()", "int run()")
        out += f"namespace p{i} {{\n{body}\n}}\n"
    cases = "".join(f"case {i}: return p{i}::run(); " for i in range(len(texts)))
    return out + f"int main(int, char** argv) {{ switch (atoi(argv[1])) {{ {cases} }} return 99; }}"


@pytest.mark.parametrize(
    "mode, seed", [("fibers", None), ("fibers", 1), ("fibers", 2), ("tsan", None), ("asan", None)]
)
def test_right_kernels_pass(mode, seed):
    chosen = [*map(str, range(len(RIGHT)))]
    for name, (code, said) in zip(
        RIGHT, programs.run(together([*RIGHT.values()]), mode, seed, chosen), strict=True
    ):
        assert code == 0, f"{name}: {said[-800:]}"


@pytest.mark.parametrize("mode", ["fibers", "tsan", "asan"])
def test_planted_faults(mode):
    """Each is found by the modes that its line names, in their words."""
    chosen = [(name, i, found[mode]) for i, (name, (_, found)) in enumerate(FAULTS.items()) if mode in found]
    results = programs.run(
        together([text for text, _ in FAULTS.values()]), mode, None, [str(i) for _, i, _ in chosen]
    )
    for (name, _, says), (code, said) in zip(chosen, results, strict=True):
        assert code != 0 and says in said, f"{name}: exit {code}: {said[-800:]}"


def test_orders_are_drawn():
    """SIMT_SEED changes who comes first, and the same seed gives the same order."""
    text = program(
        global_kernel("out[threadIdx.x + 64 * blockIdx.x] = atomicAdd(next, 1);", "int* next, float* out"),
        'int zero = 0, *next = &zero; LAUNCH for (float x : store) printf("%g ", x);',
        grid=4,
        arguments="next, out",
    )
    plain, one, again, other = (programs.run(text, seed=seed)[0][1] for seed in (None, 1, 1, 2))
    assert [float(x) for x in plain.split()] == list(range(256))
    assert one == again and len({plain, one, other}) == 3
    assert sorted(one.split()) == sorted(plain.split())


def test_matrix_products_and_bank_turns():
    """A 16 x 8 product through ldmatrix against plain loops, from rows that fall in other banks and in the same."""
    text = (
        HEAD
        + """
__global__ void k(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int pitch) {
  SIMT_SHARED(__nv_bfloat16, s);
  for (int i = threadIdx.x; i < 512; i += 32) { s[i / 16 * pitch + i % 16] = i < 256 ? a[i] : b[i - 256]; }
  __syncwarp();
  int lane = threadIdx.x;
  uint32_t x[4], y[4];
  float sum[4] = {0, 0, 0, 0};
  ldmatrix_x4(x, s + lane % 16 * pitch + lane / 16 * 8);
  ldmatrix_x4(y, s + (16 + lane % 8 + (lane / 16) * 8) * pitch + lane / 8 % 2 * 8);
  mma_bf16(sum, x, y[0], y[1]);
  int row = lane / 4, column = lane % 4 * 2;
  d[row * 8 + column] = sum[0]; d[row * 8 + column + 1] = sum[1];
  d[(row + 8) * 8 + column] = sum[2]; d[(row + 8) * 8 + column + 1] = sum[3];
}
int main() {
  __nv_bfloat16 values[512], *a = values, *b = values + 256;
  float products[128], *d = products;
  for (int i = 0; i < 256; i++) { a[i] = __float2bfloat16_rn(sinf(i)); b[i] = __float2bfloat16_rn(cosf(3 * i)); }
  for (int pitch : {64, 72}) {
    uint64_t before = simt_turns(), matrices = simt_matrices();
    SIMT_LAUNCH((k), dim3(1), dim3(32), 32 * pitch * 2, nullptr, a, b, d, pitch);
    for (int i = 0; i < 16; i++) for (int j = 0; j < 8; j++) {
      double want = 0;
      for (int k = 0; k < 16; k++) want += (double)__bfloat162float(a[i * 16 + k]) * __bfloat162float(b[j * 16 + k]);
      if (fabs(want - d[i * 8 + j]) > 1e-6) return 1;
    }
    printf("%d:%g ", pitch, (double)(simt_turns() - before) / (simt_matrices() - matrices));
  }
}
"""
    )
    code, said = programs.run(text)[0]
    assert code == 0 and said.split() == ["64:8", "72:1"]


def test_no_static_shared_arrays():
    """An array declared __shared__ would not be poisoned in a template: kernels use SIMT_SHARED alone."""
    for name, text in emulation.texts().items():
        if name != "cuda/device.cuh" and name.startswith("cuda/"):
            assert "__shared__" not in text, f"{name} declares an array __shared__"
