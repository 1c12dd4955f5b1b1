// What a block of attention's forward works on: its tile's rows, and the blocks of keys that they see, in order.
//
// Keys come in blocks counted from the start of the prefix, and of each segment. A row meets the blocks that it sees in
// one order, whatever shares its tile. All segments of a run have one prefix: a tile meets it once for all.
#pragma once
#include "attention.cuh"

namespace attention {

struct ForwardArguments {
  Heads q, k, v;
  int64_t k_step, v_step;    // bytes of the tokens that are copied at a time
  int64_t k_block, v_block;  // and of a block's
  bf16* out;                 // (T, heads, DIM)
  float* lse;                // (T, heads)
  const int* segments;
  const int* tiles;
  int* redo;                 // (programs, warps): whether a warp's sums have NaN or infinity
  int programs, kv_heads;
  Packing packing;
  float scale;               // of the scores, times log2(e)
};

// Keys key..key1-1, a block of them at a time, of which rows of the tokens low..high-1 see those up to themselves.
struct Keys {
  int segment, key, key1, low, high;
  // Without branches: four of these at once would take registers.
  __device__ __forceinline__ int seen_by(int token) const {
    return (token >= low) & (token < high) ? min(token + 1, key1) : 0;
  }
};

// What a block knows of its tile, in shared memory; its first thread writes it.
template <int ROWS, int KEYS>
struct Plan {
  int round, first, last, segment0, segment1, kv_head;
  // Blocks of keys that every row sees whole: the prefix's, then the segment's, if the tile is of one only.
  int whole, prefix_blocks, own_blocks;
  int prefix_rest, prefix1, own_rest;  // where the keys behind them begin, and the prefix's end
  int64_t k_gap, v_gap;                // bytes from the keys behind the prefix's whole blocks to the segment's first
  // The last whole block, then the rest of each segment, then of the prefix: the block at work, and the one behind.
  Keys rest[2];
  TileRow rows[ROWS];

  __device__ __forceinline__ void set(const QueryTile& t, const ForwardArguments& a) {
    const int* row = a.segments + static_cast<int64_t>(t.segment0) * 4;
    int start = row[0], prefix0 = row[2];
    first = t.first, last = t.last, segment0 = t.segment0, segment1 = t.segment1, kv_head = t.kv_head;
    prefix1 = t.segment0 < t.segment1 ? row[3] : prefix0;  // rows of no segment see nothing
    prefix_blocks = (prefix1 - prefix0) / KEYS;
    own_blocks = t.segment1 - t.segment0 == 1 ? (t.first - start) / KEYS : 0;
    whole = prefix_blocks + own_blocks;
    prefix_rest = prefix0 + prefix_blocks * KEYS;
    own_rest = start + own_blocks * KEYS;
    k_gap = (start - prefix_rest) * a.k.token;
    v_gap = (start - prefix_rest) * a.v.token;
    int key1 = own_blocks ? own_rest : prefix_rest;
    rest[0] = {segment0 - 1, key1 - KEYS, key1, 0, INT32_MAX};
    if (!whole) rest[0] = behind({segment0 - 1, 0, 0, 0, 0}, a.segments);
  }
  __device__ __forceinline__ int key(int block) const {
    return block < prefix_blocks ? prefix_rest - (prefix_blocks - block) * KEYS : own_rest - (whole - block) * KEYS;
  }
  // What comes behind a block of the rest; it has no keys where nothing does.
  __device__ __forceinline__ Keys behind(Keys k, const int* segments) const {
    k.key += KEYS;
    if (k.key < k.key1) return k;
    k.segment++;
    if (k.segment < segment1) {
      const int* row = segments + static_cast<int64_t>(k.segment) * 4;
      return {k.segment, k.segment == segment0 ? own_rest : row[0], min(row[1], last), row[0], row[1]};
    }
    return {k.segment, prefix_rest, k.segment == segment1 ? prefix1 : prefix_rest, 0, INT32_MAX};
  }
};

}  // namespace attention
