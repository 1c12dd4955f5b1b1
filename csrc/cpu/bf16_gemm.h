// GEMMs on bf16 operands with fp32 results, for CPUs that multiply bf16 (AVX-512 BF16, AMX): 205-225 GFLOP/s a core
// where fp32 reaches 85-95 (AMD, AVX-512). Through oneDNN's brgemm, as torch exports it; it wants the right operand in
// pairs along k: element (k, n) stands at [k / 2][n][k % 2]. Everything is a multiple of kGrain, which keeps
// the number of kernels that oneDNN generates small, and one set of shapes serves AVX-512 and AMX.
#pragma once

#include "common.h"

namespace hpsafety {

constexpr int64_t kGrain = 32;
inline int64_t whole_grains(int64_t n) { return (n + kGrain - 1) / kGrain * kGrain; }

// Whether this CPU and this torch can; found out once. ATEN_CPU_CAPABILITY=avx2 says no: that build has no such code.
bool multiplies_bf16();

// c (rows, n) = a (rows, k) @ b, or c += with add. b in pairs, its row of pairs ldb pairs long. rows, n and k are
// multiples of kGrain. Bits of a row do not depend on the other rows.
struct Bf16Operand {
  const BFloat16* data;
  int64_t stride;  // elements of a row; for the right operand: pairs
};
void bf16_gemm(Bf16Operand a, Bf16Operand b, float* c, int64_t ldc, int64_t rows, int64_t n, int64_t k, bool add);

// w (rows, d) into pairs along d: the right operand of h @ w^T, whole_grains(rows) wide, zeros past the last row.
void pack_transposed(const BFloat16* w, int64_t rows, int64_t d, BFloat16* out, int64_t ldb);
// w (rows, d) into pairs along the rows: the right operand of dz @ w; zeros up to whole_grains(rows).
void pack_pairs(const BFloat16* w, int64_t rows, int64_t d, BFloat16* out, int64_t ldb);
// z (rows, n) fp32 rounded to bf16: in pairs along the rows, and as it stands; zeros up to whole grains both ways.
// Either target may be null.
void round_to_bf16(const float* z, int64_t stride, int64_t rows, int64_t n, BFloat16* plain, BFloat16* pairs,
                   int64_t ld);
// h (rows, d) into (d, whole_grains(rows)); zeros past the last row.
void transpose_bf16(const BFloat16* h, int64_t rows, int64_t d, BFloat16* out, int64_t ld);
// c (d, rows) fp32 into out (rows, d) bf16, rounded to nearest even.
void transpose_to_bf16(const float* c, int64_t ldc, int64_t rows, int64_t d, BFloat16* out);

}  // namespace hpsafety
