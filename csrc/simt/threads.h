// One OS thread per CUDA thread, for the sanitizers: a missing barrier is a data race that ThreadSanitizer reports.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <ctime>
#include <memory>
#include <mutex>
#include <thread>

#include "block.h"

namespace simt {

constexpr int PATIENCE_S = 60;  // after which those who wait are taken for stuck

inline void futex_wait(std::atomic<uint32_t>* a, uint32_t value) {
  timespec second{1, 0};
  syscall(SYS_futex, a, FUTEX_WAIT_PRIVATE, value, &second, nullptr, 0);
}
inline void futex_wake(std::atomic<uint32_t>* a) { syscall(SYS_futex, a, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0); }

// All atomics are relaxed: a shuffle, a vote or an mma orders no memory, on the GPU neither.
struct Meeting {
  std::atomic<uint32_t> arrived{0}, round{0};
  void arrive(unsigned count, const char* file, int line) {
    uint32_t mine = round.load(std::memory_order_relaxed);
    asm volatile("" ::: "memory");
    if (arrived.fetch_add(1, std::memory_order_relaxed) + 1 == count) {
      arrived.store(0, std::memory_order_relaxed);
      asm volatile("" ::: "memory");
      round.store(mine + 1, std::memory_order_relaxed);
      futex_wake(&round);
    } else {
      time_t since = time(nullptr);
      while (round.load(std::memory_order_relaxed) == mine) {
        futex_wait(&round, mine);
        if (time(nullptr) - since > PATIENCE_S) die("stuck in a warp's collective at " + place(file, line));
      }
    }
    asm volatile("" ::: "memory");
  }
};
struct Barrier {  // orders memory
  std::mutex lock;
  std::condition_variable changed;
  unsigned arrived = 0, round = 0, count = 0;
  int line = 0;
  void drop() {
    std::lock_guard<std::mutex> held(lock);
    count--;
    if (count && arrived == count) next();
  }
  void next() {
    arrived = 0;
    round++;
    changed.notify_all();
  }
  void wait(const char* file, int at, bool one_line) {
    std::unique_lock<std::mutex> held(lock);
    if (arrived == 0)
      line = at;
    else if (one_line && line != at)
      die("one __syncthreads reached from lines " + std::to_string(line) + " and " + place(file, at));
    unsigned mine = round;
    if (++arrived == count) return next();
    if (!changed.wait_for(held, std::chrono::seconds(PATIENCE_S), [&] { return round != mine; }))
      die("stuck at a barrier at " + place(file, at));
  }
};
struct Warp {
  Meeting meetings[33];
  Barrier sync;
  std::atomic<uint32_t> slots[33][2][32][8];
};
inline std::vector<std::unique_ptr<Warp>> warps;
inline Barrier* block_barrier = nullptr;

inline void sync_threads(const char* file, int line) { block_barrier->wait(file, line, true); }
inline void sync_warp(unsigned, const char* file, int line) { warps[me->warp]->sync.wait(file, line, false); }

template <int K, class Use>
inline auto collective(unsigned mask, const uint32_t (&in)[K], Use&& use, const char* file, int line) {
  Warp& w = *warps[me->warp];
  if (!(mask >> me->lane & 1)) die("the calling lane is not in the mask at " + place(file, line));
  int which = mask == ~0u ? 32 : __builtin_ctz(mask);
  unsigned count = mask == ~0u ? lanes_in(me->warp) : static_cast<unsigned>(__builtin_popcount(mask));
  auto& slots = w.slots[which][w.meetings[which].round.load(std::memory_order_relaxed) & 1];
  for (int k = 0; k < K; k++) slots[me->lane][k].store(in[k], std::memory_order_relaxed);
  w.meetings[which].arrive(count, file, line);
  return use([&slots](int lane, int k) { return slots[lane][k].load(std::memory_order_relaxed); });
}

inline void launch(dim3 g, dim3 b, size_t bytes, const std::function<void()>& kernel) {
  begin_launch(g, b, bytes);
  for (unsigned number : block_order()) {
    begin_block(number, bytes);
    Barrier barrier;
    barrier.count = num_threads;
    block_barrier = &barrier;
    warps.clear();
    for (unsigned w = 0; w < (num_threads + 31) / 32; w++) {
      warps.push_back(std::make_unique<Warp>());
      warps[w]->sync.count = lanes_in(w);
    }
    for (unsigned i = 0; i < num_threads; i++) begin_thread(i);
    std::vector<std::thread> running;
    for (unsigned i = 0; i < num_threads; i++)
      running.emplace_back([i, &kernel, &barrier] {
        me = &threads[i];
        kernel();
        warps[me->warp]->sync.drop();
        barrier.drop();
      });
    for (auto& t : running) t.join();
    after_block();
  }
  free(shared);
}

}  // namespace simt
