// What the two kernels of attention's backward share.
//
// Scores stay in registers: a warp's products of scores have its own side (keys, or query rows) on the left and a tile
// of the other side on the right, and so stand as the right operand of a product of gradients, which has the same tile,
// transposed, on its left. Both read the tile by squares(). The gradients' sums then stand transposed: a lane
// with number 4 g + p holds of (16, 8) of them the columns g and g + 8, rows 2 p and 2 p + 1.
//
// The lse and -delta of a row come from a workspace in the order of the blocks' rows: of T tokens, 2^log_pack query
// heads and, slowest, the chunks of so many heads. The rows of a block are then one stretch, whatever the heads are.
#pragma once
#include "attention.cuh"

namespace attention {

constexpr int COPY_ROWS = 16;  // that all threads of a block copy at a time; no more heads are in a block of rows
constexpr int SPANS = 3;  // the one that is computed, the one that is loaded, the one that comes then

// How query heads share kv heads: chunks of 2^log_pack of them are rows of one tile.
struct Group {
  int kv_heads, chunks, log_pack;
  int64_t tokens;
  int64_t q_step, grad_step;  // bytes between rows of a tile that are COPY_ROWS apart
  // Where the workspace has the row of a token and the first head of a chunk (counted over all kv heads).
  __device__ __forceinline__ int64_t row(int64_t chunk, int64_t token) const {
    return (chunk * tokens + token) << log_pack;
  }
};

// threadIdx.x, read here: what follows from it is made where it is needed, and takes no registers in a loop before.
__device__ __forceinline__ unsigned thread_again() {
#ifdef __CUDACC__
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

// Copies ROWS rows of a (T, heads, DIM) tensor to a tile by all threads of a block: row r is token r >> log_pack, head
// r % 2^log_pack. `from`: this thread's chunk in the first COPY_ROWS rows; `step`: the bytes between rows so far apart.
template <int DIM, int ROWS, int THREADS>
struct RowsCopy {
  static_assert(THREADS == COPY_ROWS * Row<DIM>::CHUNKS && ROWS % COPY_ROWS == 0, "a chunk for each thread");
  static __device__ __forceinline__ const unsigned char* from(const Heads& x, int64_t token, int64_t head,
                                                              int log_pack) {
    unsigned thread = thread_again(), row = thread / Row<DIM>::CHUNKS, chunk = thread % Row<DIM>::CHUNKS;
    token += row >> log_pack;
    head += row & ((1 << log_pack) - 1);
    return x.at + (token * x.token + head * x.head + chunk * 16);
  }
  // Moves `from` on by ROWS. Rows from `count` on are zeros, unless the tile is WHOLE.
  template <bool WHOLE>
  static __device__ __forceinline__ void copy(unsigned char* tile, const unsigned char*& from, int64_t step,
                                              int count) {
    const unsigned thread = thread_again(), row = thread / Row<DIM>::CHUNKS;
    unsigned char* to = tile + (thread ^ row % 8) * 16;  // Row::at(row, chunk)
    count -= row;
#pragma unroll
    for (int i = 0; i < ROWS / COPY_ROWS; i++, from += step)
      cp_async16(to + i * COPY_ROWS * Row<DIM>::BYTES, from, WHOLE || i * COPY_ROWS < count);
  }
};

// Fragments::right of a whole tile, made again rather than kept where registers are short.
template <int DIM>
__device__ __forceinline__ Fragments<DIM> squares() {
  int lane = static_cast<int>(threadIdx.x % 32);
  return {Row<DIM>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
}

// Volatile: read at each use, so that it takes no registers between two.
__device__ __forceinline__ void load16(uint32_t (&r)[4], const unsigned char* from) {
#ifdef __CUDACC__
  asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(from))
               : "memory");
#else
  memcpy(r, from, sizeof r);
#endif
}
__device__ __forceinline__ void store16(unsigned char* to, const uint32_t (&r)[4]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(r[0], r[1], r[2], r[3]);
}

// Two (16 scores of this side, 8 of the other) products, adjacent on the other side: right operands for both 8 of this.
__device__ __forceinline__ void right_operands(uint32_t (&b)[2][2], const float (&low)[4], const float (&high)[4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    b[half][0] = pack_bf16(low[2 * half], low[2 * half + 1]);
    b[half][1] = pack_bf16(high[2 * half], high[2 * half + 1]);
  }
}

// Transposed sums of 16 rows of a warp, times scale, to rows row0.. of a tile in shared memory, as bf16.
template <int DIM>
__device__ __forceinline__ void put_rows(unsigned char* tile, int row0, const float (&sums)[DIM / 16][2][4],
                                         float scale) {
  int group = static_cast<int>(threadIdx.x % 32 / 4), pair = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int c = 0; c < DIM / 16; c++)
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        *reinterpret_cast<bf16*>(tile + Row<DIM>::at(row0 + 8 * n + 2 * pair + i % 2, 2 * c + i / 2) + 2 * group) =
            __float2bfloat16(sums[c][n][i] * scale);
}

// The launchers' checks of what their kernels' addresses depend on.
inline bool fits(const Heads& x) {
  return reinterpret_cast<uintptr_t>(x.at) % 16 == 0 && x.token % 16 == 0 && x.head % 16 == 0;
}
inline bool fits(const Group& g, int64_t programs) {
  return g.tokens > 0 && g.tokens <= INT32_MAX && g.kv_heads > 0 && g.chunks > 0 && g.log_pack >= 0 &&
         1 << g.log_pack <= COPY_ROWS && programs > 0 && programs <= INT32_MAX;
}
inline Heads heads(const void* at, int64_t token, int64_t head) {  // strides in elements
  return {static_cast<const unsigned char*>(at), token * 2, head * 2};
}
inline Group group(int64_t tokens, int kv_heads, int chunks, int log_pack, const Heads& q, const Heads& grad) {
  int64_t step = COPY_ROWS >> log_pack;
  return {kv_heads, chunks, log_pack, tokens, step * q.token, step * grad.token};
}
constexpr double LOG2E = 1.4426950408889634;

}  // namespace attention
