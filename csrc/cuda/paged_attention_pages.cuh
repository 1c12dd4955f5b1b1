// Keys and values in pages: where a token stands, and its way to shared memory.
#pragma once
#include "device.cuh"

namespace paged {

constexpr int SPLIT = 512;     // keys; of the wrapper too
constexpr int TILE_ROWS = 64;  // (member, head) rows of a group that share a pass over its pages

// Group g owns the tiles from this on up to the next group's: always enough for its rows, and known without the other
// groups' tiles. `first` is the number of sequences in groups before it.
__host__ __device__ __forceinline__ int64_t first_tile(int64_t first, int64_t group, int64_t heads) {
  return first * heads / TILE_ROWS + group;
}

// n / divisor for n < 2^31 by a multiplication: a page size is known when the kernel is launched, not before.
struct Divisor {
  unsigned by, factor, shift;
  __device__ __forceinline__ unsigned divide(unsigned n) const { return (__umulhi(n, factor) + n) >> shift; }
};
inline Divisor divisor(unsigned by) {
  unsigned shift = 0;
  while ((1ull << shift) < by) shift++;
  return {by, static_cast<unsigned>((((1ull << shift) - by) << 32) / by + 1), shift};
}

struct Pages {
  const __nv_bfloat16 *k, *v;                              // (pages, page size, G, K)
  int64_t k_page, k_slot, k_head, v_page, v_slot, v_head;  // strides in elements
  Divisor size;
};

// 16-byte word `word` of row `row`: the words of 8 rows at a place lie in different banks.
template <int DIM>
__device__ __forceinline__ int place_of(int row, int word) {
  return row * (DIM / 8) + (word ^ row % 8);
}
template <int DIM>
__device__ __forceinline__ const uint4* word_of(const uint4* rows, int row, int word) {
  return rows + place_of<DIM>(row, word);
}

// Copies KEYS keys and values of one head to shared memory, by TEAM threads; zeros behind the last token. Pages are
// looked up one turn ahead, so that a copy does not wait for the table. ALIGNED: all rows are at 16-byte addresses.
template <int DIM, int KEYS, int TEAM, bool ALIGNED>
struct Copier {
  static constexpr int WORDS = DIM / 8, STEP = TEAM / WORDS, TURNS = KEYS / STEP;
  static_assert(TEAM % WORDS == 0 && KEYS % STEP == 0, "whole rows at a time");
  const Pages& pages;
  const int* table;
  int64_t head;
  unsigned end, first;
  int page[TURNS];

  __device__ __forceinline__ Copier(const Pages& pages, const int* table, int64_t head, unsigned end)
      : pages(pages), table(table), head(head), end(end), first(0) {}

  __device__ __forceinline__ unsigned token(int turn) const { return first + turn * STEP + threadIdx.x % TEAM / WORDS; }
  __device__ __forceinline__ void locate(unsigned key) {
    first = key;
#pragma unroll
    for (int i = 0; i < TURNS; i++) page[i] = token(i) < end ? table[pages.size.divide(token(i))] : 0;
  }
  // Of the keys that were located last.
  __device__ __forceinline__ void copy(uint4* keys, uint4* values) const {
    int word = threadIdx.x % WORDS;
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      bool there = token(i) < end;
      unsigned slot = there ? token(i) - pages.size.divide(token(i)) * pages.size.by : 0;
      const __nv_bfloat16* k = pages.k + page[i] * pages.k_page + slot * pages.k_slot + head * pages.k_head + word * 8;
      const __nv_bfloat16* v = pages.v + page[i] * pages.v_page + slot * pages.v_slot + head * pages.v_head + word * 8;
      int to = place_of<DIM>(threadIdx.x % TEAM / WORDS + i * STEP, word);
      if constexpr (ALIGNED) {
        cp_async16(keys + to, there ? k : pages.k, there);
        cp_async16(values + to, there ? v : pages.v, there);
      } else {
        copy_elements(keys + to, k, there);
        copy_elements(values + to, v, there);
      }
    }
  }
  // The same word for word where addresses allow no more.
  __device__ __forceinline__ void copy_elements(uint4* to, const __nv_bfloat16* from, bool there) const {
    auto* elements = reinterpret_cast<__nv_bfloat16*>(to);
#pragma unroll
    for (int i = 0; i < 8; i++) elements[i] = there ? from[i] : __float2bfloat16_rn(0.f);
  }
};

}  // namespace paged
