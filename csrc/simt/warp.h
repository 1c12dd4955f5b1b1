// What the lanes of a warp do together, and what a thread does to memory.
#pragma once
#include <cmath>
#ifdef SIMT_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace simt {

// ---- shuffles and votes
template <class V>
inline V shuffle(unsigned mask, V value, int from, const char* file, int line) {
  constexpr int WORDS = sizeof(V) / 4;
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "4 or 8 bytes");
  uint32_t in[WORDS];
  memcpy(in, &value, sizeof value);
  return collective<WORDS>(
      mask, in,
      [&](auto get) {
        if (!(mask >> from & 1)) die("a shuffle reads lane " + std::to_string(from) + ", which is not in the mask, at " + place(file, line));
        uint32_t out[WORDS];
        for (int k = 0; k < WORDS; k++) out[k] = get(from, k);
        V result;
        memcpy(&result, out, sizeof result);
        return result;
      },
      file, line);
}
inline int lane_of(int i, int width) { return (static_cast<int>(me->lane) & ~(width - 1)) | (i & (width - 1)); }
inline int lane_xor(int x, int width) {
  int lane = static_cast<int>(me->lane), to = lane ^ x;
  return (to & ~(width - 1)) == (lane & ~(width - 1)) ? to : lane;
}
inline int lane_down(int by, int width) {
  int lane = static_cast<int>(me->lane);
  return (lane & (width - 1)) + by < width ? lane + by : lane;
}
inline int lane_up(int by, int width) {
  int lane = static_cast<int>(me->lane);
  return (lane & (width - 1)) - by >= 0 ? lane - by : lane;
}
inline unsigned ballot(unsigned mask, bool vote, const char* file, int line) {
  uint32_t in[1] = {vote};
  return collective<1>(
      mask, in,
      [&](auto get) {
        unsigned result = 0;
        for (unsigned k = 0; k < lanes_in(me->warp); k++)
          if (mask >> k & 1) result |= (get(static_cast<int>(k), 0) & 1u) << k;
        return result;
      },
      file, line);
}

// ---- tensor cores: exact products, summed in double, rounded once an instruction
inline float half_of(uint32_t word, bool high) {
  uint32_t bits = high ? word & 0xffff0000u : word << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file, int line) {
  uint32_t in[6] = {a[0], a[1], a[2], a[3], b0, b1};
  collective<6>(
      ~0u, in,
      [&](auto get) {
        int group = static_cast<int>(me->lane) >> 2, pair = static_cast<int>(me->lane) & 3;
        for (int o = 0; o < 4; o++) {
          int low_row = o >> 1, column = 2 * pair + (o & 1);
          double sum = 0;
          for (int k = 0; k < 16; k += 2) {
            uint32_t x = get(group * 4 + k % 8 / 2, (k >= 8 ? 2 : 0) + low_row);
            uint32_t y = get(column * 4 + k % 8 / 2, 4 + (k >= 8));
            sum += static_cast<double>(half_of(x, false)) * half_of(y, false) +
                   static_cast<double>(half_of(x, true)) * half_of(y, true);
          }
          d[o] = static_cast<float>(d[o] + sum);
        }
        return 0;
      },
      file, line);
}

// ---- ldmatrix, which also counts what the banks make of it: 8 rows of 16 bytes are read in as many turns as the
// fullest of the 8 columns of 16 bytes has rows; one turn is the best
inline std::atomic<uint64_t> matrices{0}, turns{0};

template <int N, bool TRANSPOSED>
inline void ldmatrix(uint32_t (&r)[N], const void* p, const char* file, int line) {
  auto address = reinterpret_cast<uint64_t>(p);
  uint32_t in[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  if (address & 15) die("ldmatrix: a row is not 16-byte aligned at " + place(file, line));
  collective<2>(
      ~0u, in,
      [&](auto get) {
        auto at = [&](int lane) {
          return reinterpret_cast<const uint16_t*>(get(lane, 0) | static_cast<uint64_t>(get(lane, 1)) << 32);
        };
        int group = static_cast<int>(me->lane) >> 2, pair = static_cast<int>(me->lane) & 3;
        for (int m = 0; m < N; m++) {
          if (!TRANSPOSED) {
            const uint16_t* row = at(m * 8 + group);
            r[m] = row[2 * pair] | static_cast<uint32_t>(row[2 * pair + 1]) << 16;
          } else {
            r[m] = at(m * 8 + 2 * pair)[group] | static_cast<uint32_t>(at(m * 8 + 2 * pair + 1)[group]) << 16;
          }
          if (me->lane == 0) {
            const uint16_t* rows[8];
            unsigned most = 0, columns[8] = {};
            for (int i = 0; i < 8; i++) {
              rows[i] = at(m * 8 + i);
              if (std::find(rows, rows + i, rows[i]) == rows + i)  // the same row is read once for all
                most = std::max(most, ++columns[reinterpret_cast<uint64_t>(rows[i]) / 16 % 8]);
            }
            matrices.fetch_add(1, std::memory_order_relaxed);
            turns.fetch_add(most, std::memory_order_relaxed);
          }
        }
        return 0;
      },
      file, line);
}

// ---- cp.async: poison until it is waited for
inline void copy_async(void* to, const void* from, bool there, unsigned bytes) {
  if ((reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from)) & (bytes - 1))
    die("cp_async" + std::to_string(bytes) + ": not " + std::to_string(bytes) + "-byte aligned");
  memset(to, 0xff, bytes);
  me->open.push_back({to, from, there, bytes});
}
inline void commit_copies() {
  me->groups.push_back(std::move(me->open));
  me->open.clear();
}
inline void wait_for_copies(size_t left) {
  while (me->groups.size() > left) {
    for (auto& c : me->groups.front()) {
      if (c.there)
        memcpy(c.to, c.from, c.bytes);
      else
        memset(c.to, 0, c.bytes);
    }
    me->groups.erase(me->groups.begin());
  }
}

// ---- atomics, relaxed as in CUDA
template <class V, class F>
inline V change(V* p, F f) {
  mark_atomic(p, sizeof(V));
  V old, fresh;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do fresh = f(old);
  while (!__atomic_compare_exchange(p, &old, &fresh, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace simt
