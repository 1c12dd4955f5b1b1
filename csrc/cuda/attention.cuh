// What the attention kernels share: tiles of bf16 rows in shared memory, fragments of them, and who works on what.
//
// Fragments are those of mma.m16n8k16. A lane with number 4 g + p holds of a (16, 8) product rows g and g + 8, columns
// 2 p and 2 p + 1. A 16 x 16 square of a tile is one ldmatrix_x4, always with the same address in a lane (Fragments):
//   left operand, rows x depth            r = {r[0], r[1], r[2], r[3]}
//   right operand, the tile is (n, depth)  its n 0..7: (r[0], r[2]), its n 8..15: (r[1], r[3])
//   right operand, the tile is (depth, n), transposed: n 0..7: (r[0], r[1]), n 8..15: (r[2], r[3])
#pragma once
#include "device.cuh"

namespace attention {

using bf16 = __nv_bfloat16;

constexpr float LOWEST = -3.4028234663852886e38f;  // the first maximum: finite, so that a score of -inf has weight 0
constexpr float INF = __builtin_huge_valf();

// A row of DIM bf16 in shared memory. Its 16-byte chunk c stands in place c ^ row % 8 (of each 8): the same chunk of
// eight rows, which is what ldmatrix reads at a time, fills all 32 banks.
template <int DIM>
struct Row {
  static_assert(DIM % 64 == 0, "whole groups of 8 chunks");
  static constexpr int BYTES = DIM * 2, CHUNKS = DIM / 8;
  static __device__ __forceinline__ int at(int row, int chunk) { return row * BYTES + ((chunk ^ (row & 7)) << 4); }
};

// Where this lane reads 16 x 16 squares of tiles whose rows have DIM numbers: only constants are added to four offsets.
template <int DIM>
struct Fragments {
  int at[4];
  __device__ __forceinline__ Fragments() {
#pragma unroll
    for (int j = 0; j < 4; j++) at[j] = Row<DIM>::at(threadIdx.x % 16, 2 * j + threadIdx.x % 32 / 16);
  }
  // Rows 16 row.., columns 16 column.. of a tile; both known to the compiler.
  __device__ __forceinline__ int of(int row, int column) const {
    return at[column % 4] + (column / 4 * 128 + row * 16 * Row<DIM>::BYTES);
  }
};

// A (T, heads, DIM) tensor whose last dim is contiguous; strides in elements.
struct Heads {
  const bf16* at;
  int64_t token, head;
};

// Copies ROWS rows of a tile by all THREADS of a block. `to` and `from` are this thread's chunk in the first rows:
// row threadIdx.x / CHUNKS, chunk threadIdx.x % CHUNKS. Rows from `count` on are zeros; without a count all are there.
template <int DIM, int ROWS, int THREADS>
struct TileCopy {
  static constexpr int STEP = THREADS / Row<DIM>::CHUNKS;  // rows at a time
  static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "a thread has one place among the banks");
  static __device__ __forceinline__ int row() { return threadIdx.x / Row<DIM>::CHUNKS; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % Row<DIM>::CHUNKS; }
  static __device__ __forceinline__ int to() { return Row<DIM>::at(row(), chunk()); }
  static __device__ __forceinline__ const bf16* from(const Heads& x, int64_t head) {
    return x.at + (head * x.head + row() * x.token + chunk() * 8);
  }
  static __device__ __forceinline__ void copy(unsigned char* to, const bf16* from, int64_t stride) {
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++, from += STEP * stride) cp_async16(to + i * STEP * Row<DIM>::BYTES, from);
  }
  static __device__ __forceinline__ void copy(unsigned char* to, const bf16* from, int64_t stride, int count) {
    count -= row();
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++, from += STEP * stride)
      cp_async16(to + i * STEP * Row<DIM>::BYTES, from, i * STEP < count);
  }
};

// Query heads of one kv head as rows of a tile: row r is token r / pack, head r % pack of a chunk of the group's heads.
struct Packing {
  int ratio, pack, chunks;  // query heads of a kv head; of a tile; tiles that they take
};

// A row of attention_tiles.query_tiles, for one kv head and chunk of its query heads.
struct QueryTile {
  int first, last, segment0, segment1, kv_head, chunk;
};
__device__ __forceinline__ QueryTile query_tile(const int* tiles, int program, int kv_heads, const Packing& packing) {
  int each = kv_heads * packing.chunks, tile = program / each, rest = program - tile * each;
  const int* row = tiles + static_cast<int64_t>(tile) * 4;
  return {row[0], row[1], row[2], row[3], rest / packing.chunks, rest % packing.chunks};
}

// Token and query head of a row of a tile.
struct TileRow {
  int token, head;
  bool valid;
};
template <int ROWS>
__device__ __forceinline__ TileRow tile_row(const QueryTile& t, const Packing& p, int row) {
  int token = row / p.pack, of_group = t.chunk * p.pack + row - token * p.pack;
  bool valid = token < ROWS / p.pack && of_group < p.ratio && t.first + token < t.last;
  return {t.first + token, t.kv_head * p.ratio + of_group, valid};
}

// Programs of a block in a launch of fewer blocks than programs. They stand longest first: each two rounds a block takes
// one from the front and one from the back of 2 gridDim, so that all get as much.
struct Snake {
  int program, step;
  __device__ __forceinline__ Snake()
      : program(static_cast<int>(blockIdx.x)), step(2 * static_cast<int>(gridDim.x - blockIdx.x) - 1) {}
  __device__ __forceinline__ void next() {
    program += step;
    step = 2 * static_cast<int>(gridDim.x) - step;
  }
};

}  // namespace attention
