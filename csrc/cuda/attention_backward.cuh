// What the two kernels of attention's backward share. They are written for a warp that keeps the scores of a block in
// registers: a product's layout is that of the next one's left operand, so no score passes through shared memory.
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
  int64_t q_step, grad_step;  // elements between rows of a tile that are COPY_ROWS apart
  // Where the workspace has the row of a token and the first head of a chunk (counted over all kv heads).
  __device__ __forceinline__ int64_t row(int64_t chunk, int64_t token) const {
    return (chunk * tokens + token) << log_pack;
  }
};

// Rows of q or of the gradient as the rows of a tile: row r is token r >> log_pack, head r % 2^log_pack of a chunk.
template <int DIM, int ROWS, int THREADS>
struct RowsCopy {
  using Tile = TileCopy<DIM, ROWS, THREADS>;
  static_assert(Tile::STEP == COPY_ROWS, "a thread's rows are whole tokens apart");
  static __device__ __forceinline__ const bf16* from(const Heads& x, int64_t token, int64_t head, int log_pack) {
    int row = Tile::row();
    token += row >> log_pack;
    head += row & ((1 << log_pack) - 1);
    return x.at + (token * x.token + head * x.head + Tile::chunk() * 8);
  }
  // Moves `from` on by ROWS. Rows from `count` on are zeros, unless the tile is WHOLE.
  template <bool WHOLE>
  static __device__ __forceinline__ void copy(unsigned char* to, const bf16*& from, int64_t step, int count) {
    count -= Tile::row();
#pragma unroll
    for (int i = 0; i < ROWS / COPY_ROWS; i++, from += step)
      cp_async16(to + i * COPY_ROWS * Row<DIM>::BYTES, from, WHOLE || i * COPY_ROWS < count);
  }
};

// Where this lane reads 16 x 16 squares, in an order that serves both products a tile has a part in, without a move of
// registers: a right operand must be two adjacent ones.
//   ldmatrix_x4, the tile is (n, depth) of a right operand    its n 0..7: r[0], r[1], its n 8..15: r[2], r[3]
//   ldmatrix_x4_trans, the tile is (depth, rows) of a left    r
// So a product of scores has the tile on its right, and a product of gradients, on its left, gives sums that stand
// transposed: a lane with number 4 g + p holds of (16, 8) sums the columns g and g + 8 of the gradient, rows 2 p, 2 p + 1.
template <int DIM>
struct Squares {
  int at[4];
  __device__ __forceinline__ Squares() {
    int lane = static_cast<int>(threadIdx.x % 32);
    at[0] = Row<DIM>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int j = 1; j < 4; j++) at[j] = at[0] ^ 32 * j;
  }
  __device__ __forceinline__ int of(int row, int column) const {
    return at[column % 4] + (column / 4 * 128 + row * 16 * Row<DIM>::BYTES);
  }
};

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
__device__ __forceinline__ void put_rows(unsigned char* tile, int row0, const float (&sums)[DIM / 16][2][4], float scale) {
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
  return reinterpret_cast<uintptr_t>(x.at) % 16 == 0 && x.token % 8 == 0 && x.head % 8 == 0;
}
inline bool fits(const Group& g, int64_t programs) {
  return g.tokens > 0 && g.tokens <= INT32_MAX && g.kv_heads > 0 && g.chunks > 0 && g.log_pack >= 0 &&
         1 << g.log_pack <= COPY_ROWS && programs > 0 && programs <= INT32_MAX;
}
inline Heads heads(const void* at, int64_t token, int64_t head) { return {static_cast<const bf16*>(at), token, head}; }
inline Group group(int64_t tokens, int kv_heads, int chunks, int log_pack, const Heads& q, const Heads& grad) {
  int64_t step = COPY_ROWS >> log_pack;
  return {kv_heads, chunks, log_pack, tokens, step * q.token, step * grad.token};
}
constexpr double LOG2E = 1.4426950408889634;

}  // namespace attention
