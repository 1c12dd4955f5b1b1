// The block that runs: its threads, its shared memory, and who wrote what. Blocks run one after another.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace simt {

constexpr unsigned MOST_THREADS = 1024;
constexpr size_t MOST_SHARED = 227 * 1024;  // of sm_90; sm_80 has 163 KB, which the static check looks after

[[noreturn]] inline void die(const std::string& message) {
  fprintf(stderr, "simt: %s\n", message.c_str());
  fflush(stderr);
  _exit(97);
}
inline std::string place(const char* file, int line) { return std::string(file) + ":" + std::to_string(line); }

// A copy to shared memory that was issued and has not been waited for.
struct Copy {
  void* to;
  const void* from;
  bool there;
  unsigned bytes;
};
struct Thread {
  uint3 index, block;
  unsigned linear, lane, warp;
  bool done;
  void* stack;       // fibers: where it goes on
  const void* wait;  // fibers: what it waits for, and from where
  const char* file;
  int line;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

inline dim3 grid, block;
inline unsigned num_threads = 0, block_number = 0;
inline unsigned char* shared = nullptr;
inline std::vector<Thread> threads;
inline std::mt19937 random_order;
inline bool shuffled = false;  // SIMT_SEED is set: threads and blocks come in a drawn order
#ifdef SIMT_THREADS
inline thread_local Thread* me = nullptr;
#else
inline Thread* me = nullptr;
#endif

inline unsigned lanes_in(unsigned warp) { return std::min(32u, num_threads - warp * 32); }

// ---- what is written by whom. A watched tensor is looked at before and after every block.
//
// `output`: nothing reads it in the launch. What a block wrote is put aside and the place filled with poison again, so
// that a second block's write is seen whatever its value is: but for a byte of the poison's own value, which counts as
// not written.
struct Watch {
  unsigned char* at;
  size_t bytes;
  std::string name;
  bool output;
  std::vector<unsigned char> before, result;
  std::vector<int> owner;  // of each byte: the block that wrote it, -1 for none
  std::vector<char> atomic;
  bool told = false;
};
inline std::vector<Watch> watches;
inline int conflicts = 0;
constexpr unsigned char POISON = 0xA7;

inline void watch(void* at, size_t bytes, const char* name, bool output = false) {
  auto* p = static_cast<unsigned char*>(at);
  Watch w{p, bytes, name, output, {}, {}, std::vector<int>(bytes, -1), std::vector<char>(bytes, 0)};
  w.result.assign(p, p + bytes);
  if (output) memset(p, POISON, bytes);
  w.before.assign(p, p + bytes);
  watches.push_back(std::move(w));
}
inline void after_block() {
  for (auto& w : watches)
    for (size_t i = 0; i < w.bytes; i++) {
      if (w.at[i] == w.before[i]) continue;
      if (w.owner[i] >= 0 && w.owner[i] != static_cast<int>(block_number) && !w.atomic[i] && !w.told) {
        fprintf(stderr, "simt: blocks %d and %u both wrote %s at byte %zu without atomics\n", w.owner[i], block_number,
                w.name.c_str(), i);
        w.told = true;
        conflicts++;
      }
      w.owner[i] = static_cast<int>(block_number);
      w.result[i] = w.at[i];
      if (w.output)
        w.at[i] = w.before[i];
      else
        w.before[i] = w.at[i];
    }
}
// The launches are over: outputs get what was written, and keep what was there where nothing was. A byte that was not
// seen to change beside one that was, in a number of two bytes or more, was written with the poison's value.
inline void end_watch() {
  for (auto& w : watches) {
    if (!w.output) continue;
    for (size_t i = 0; i < w.bytes; i++)
      if (w.owner[i] < 0 && (i ^ 1) < w.bytes && w.owner[i ^ 1] >= 0) w.result[i] = POISON;
    memcpy(w.at, w.result.data(), w.bytes);
  }
  watches.clear();
}
inline void mark_atomic(void* p, size_t bytes) {
  for (auto& w : watches) {
    auto* at = static_cast<unsigned char*>(p);
    if (at >= w.at && at < w.at + w.bytes)
      for (size_t k = 0; k < bytes; k++) __atomic_store_n(&w.atomic[at - w.at + k], 1, __ATOMIC_RELAXED);
  }
}

// ---- what was launched, a line each: kernel, blocks, threads, bytes of shared memory. `dry`: and not run
inline bool dry = false;
inline std::string launched;
template <auto Kernel>
const char* name_of() {
  return __PRETTY_FUNCTION__;
}
inline void note(const char* name, dim3 g, dim3 b, size_t bytes) {
  if (launched.size() > (1 << 20)) launched.clear();  // nobody reads it
  launched += std::string(name) + "|" + std::to_string(size_t{g.x} * g.y * g.z) + "|" + std::to_string(b.x * b.y * b.z) + "|" +
              std::to_string(bytes) + "\n";
}

// ---- a launch
inline void begin_launch(dim3 g, dim3 b, size_t bytes) {
  grid = g;
  block = b;
  if (!g.x || !g.y || !g.z || g.y > 65535 || g.z > 65535) die("a grid of no blocks, or of over 65535 in y or z");
  if (size_t{b.x} * b.y * b.z > MOST_THREADS || !b.x || !b.y || !b.z) die("a block of no threads, or of over 1024");
  if (bytes > MOST_SHARED) die("more than 227 KiB of shared memory");
  num_threads = b.x * b.y * b.z;
  const char* seed = getenv("SIMT_SEED");
  shuffled = seed && *seed;
  if (shuffled) random_order.seed(static_cast<unsigned>(atoi(seed)));
  threads.assign(num_threads, {});
  // To the byte: what lies behind it is out of bounds for AddressSanitizer.
  if (posix_memalign(reinterpret_cast<void**>(&shared), 1024, std::max<size_t>(bytes, 16))) die("out of memory");
}
inline std::vector<unsigned> block_order() {
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); i++) order[i] = i;
  if (getenv("SIMT_LAST")) order = {order.back()};
  if (shuffled) std::shuffle(order.begin(), order.end(), random_order);
  return order;
}
// Shared memory of a fresh block holds NaN.
inline void begin_block(unsigned number, size_t bytes) {
  block_number = number;
  memset(shared, 0xff, bytes);
}
inline void begin_thread(unsigned i) {
  Thread& t = threads[i];
  t = {};
  t.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  t.block = {block_number % grid.x, block_number / grid.x % grid.y, block_number / (grid.x * grid.y)};
  t.linear = i;
  t.lane = i % 32;
  t.warp = i / 32;
}

}  // namespace simt
