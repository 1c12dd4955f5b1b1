// What the attention kernels share: tiles of bf16 rows in shared memory, fragments of them, and who works on what.
//
// Fragments are those of mma.m16n8k16. A lane with number 4 g + p holds of a (16, 8) product rows g and g + 8, columns
// 2 p and 2 p + 1. A 16 x 16 square of a tile is one ldmatrix_x4 into r; operands stand in neighbouring registers:
//   left operand, rows x depth              Fragments::left, r itself
//   right operand, the tile is (n, depth)    Fragments::right, its n 0..7: (r[0], r[1]), its n 8..15: (r[2], r[3])
//   right operand, the tile is (depth, n)    Fragments::left and ldmatrix_x4_trans, the same pairs
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

// The compiler takes it for a number that it knows nothing of: it stays in its register through a loop, where it would
// else be made again in every turn.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDACC__
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
#endif
  return x;
}

// Where this lane reads 16 x 16 squares of tiles whose rows have DIM numbers: an offset, and constants for each square.
template <int DIM>
struct Fragments {
  int at;
  // The squares start at a row of the tile, a multiple of 8.
  static __device__ __forceinline__ Fragments left(int row) {
    return {opaque(Row<DIM>::at(row + threadIdx.x % 16, threadIdx.x % 32 / 16))};
  }
  static __device__ __forceinline__ Fragments right(int row) {
    return {opaque(Row<DIM>::at(row + threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, threadIdx.x / 8 % 2))};
  }
  // Rows 16 row.., columns 16 column.. of a tile; both known to the compiler.
  __device__ __forceinline__ int of(int row, int column) const {
    return (at ^ column % 4 * 32) + (column / 4 * 128 + row * 16 * Row<DIM>::BYTES);
  }
};

// A (T, heads, DIM) tensor whose last dim is contiguous; strides in bytes.
struct Heads {
  const unsigned char* at;
  int64_t token, head;
};

// Copies ROWS rows of a tile by all THREADS of a block. `to` and `from` are this thread's chunk in the first rows:
// row threadIdx.x / CHUNKS, chunk threadIdx.x % CHUNKS; `step` is the bytes of STEP tokens. Rows from `count` on are
// zeros. Without a count all are there, and `from`, at first a step before the first, goes on to the last of them.
template <int DIM, int ROWS, int THREADS>
struct TileCopy {
  static constexpr int STEP = THREADS / Row<DIM>::CHUNKS;  // rows at a time
  static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "a thread has one place among the banks");
  static __device__ __forceinline__ int row() { return threadIdx.x / Row<DIM>::CHUNKS; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % Row<DIM>::CHUNKS; }
  static __device__ __forceinline__ int to() { return Row<DIM>::at(row(), chunk()); }
  static __device__ __forceinline__ const unsigned char* from(const Heads& x, int head, int token) {
    return x.at + ((token + row()) * x.token + head * x.head + chunk() * 16);
  }
  static __device__ __forceinline__ void copy(unsigned char* to, const unsigned char*& from, int64_t step) {
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) cp_async16(to + i * STEP * Row<DIM>::BYTES, from += step);
  }
  static __device__ __forceinline__ void copy(unsigned char* to, const unsigned char* from, int64_t step, int count) {
    count -= row();
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++, from += step)
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

// Token and query head of a row of a tile; token -1 where there is none.
struct TileRow {
  int token, head;
};
template <int ROWS>
__device__ __forceinline__ TileRow tile_row(const QueryTile& t, const Packing& p, int row) {
  int token = row / p.pack, of_group = t.chunk * p.pack + row - token * p.pack;
  bool valid = token < ROWS / p.pack && of_group < p.ratio && t.first + token < t.last;
  return {valid ? t.first + token : -1, t.kv_head * p.ratio + of_group};
}

// A block's program in a round, in a launch of fewer blocks than programs. They stand longest first: a block is first
// in one round and last in the next, so that all get as much.
__device__ __forceinline__ int program_of(int round) {
  int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

}  // namespace attention
