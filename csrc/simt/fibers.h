// All CUDA threads of a block as fibers of one OS thread: fast, in a known order, and a deadlock is seen at once.
#pragma once
#include <map>

#include "block.h"

#if !defined(__x86_64__)
#error "fibers switch stacks in x86-64 assembly; elsewhere use -DSIMT_THREADS"
#endif

namespace simt {

inline void go_on();

struct Meeting {
  unsigned arrived = 0, round = 0;
  int line = 0;
};
struct Slot {
  uint32_t word[8];
};
struct Warp {
  Meeting meetings[33], sync;  // by the lowest lane of the mask; 32: the whole warp
  Slot slots[33][2][32];
};
inline std::vector<Warp> warps;
inline std::vector<unsigned> alive_in;  // threads of each warp that have not returned
inline unsigned alive = 0;
inline Meeting block_meeting;
inline std::vector<Thread*> ready;
inline size_t next_ready = 0;

inline void release(const void* key) {
  size_t from = ready.size();
  for (auto& t : threads)
    if (t.wait == key) {
      t.wait = nullptr;
      ready.push_back(&t);
    }
  if (shuffled) std::shuffle(ready.begin() + static_cast<long>(from), ready.end(), random_order);
}
inline void finish(Meeting& m) {
  m.arrived = 0;
  m.round++;
  release(&m);
}
inline void meet(Meeting& m, unsigned count, const char* file, int line, bool one_line) {
  if (m.arrived == 0)
    m.line = line;
  else if (one_line && m.line != line)
    die("one __syncthreads reached from lines " + std::to_string(m.line) + " and " + place(file, line));
  if (++m.arrived == count) {
    finish(m);
    if (!shuffled) return;
    ready.push_back(me);
    std::swap(ready.back(), ready[next_ready + random_order() % (ready.size() - next_ready)]);
  } else {
    me->wait = &m;
    me->file = file;
    me->line = line;
  }
  go_on();
}
inline void sync_threads(const char* file, int line) { meet(block_meeting, alive, file, line, true); }
inline void sync_warp(unsigned mask, const char* file, int line) {
  unsigned count = mask == ~0u ? alive_in[me->warp] : static_cast<unsigned>(__builtin_popcount(mask));
  meet(warps[me->warp].sync, count, file, line, false);
}

// Every lane of the mask gives K words; use(get) then reads those of any: get(lane, k). Orders no memory.
template <int K, class Use>
inline auto collective(unsigned mask, const uint32_t (&in)[K], Use&& use, const char* file, int line) {
  Warp& w = warps[me->warp];
  if (!(mask >> me->lane & 1)) die("the calling lane is not in the mask at " + place(file, line));
  int which = mask == ~0u ? 32 : __builtin_ctz(mask);
  unsigned count = mask == ~0u ? lanes_in(me->warp) : static_cast<unsigned>(__builtin_popcount(mask));
  Slot* slots = w.slots[which][w.meetings[which].round & 1];
  memcpy(slots[me->lane].word, in, sizeof in);
  meet(w.meetings[which], count, file, line, false);
  return use([slots](int lane, int k) { return slots[lane].word[k]; });
}

constexpr size_t STACK = 256 * 1024;
inline const std::function<void()>* body = nullptr;
inline void* main_stack = nullptr;
inline std::vector<char*> stacks;

__attribute__((naked, noinline, used)) inline void switch_to(void** save, void* load) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void go_on() {
  Thread* self = me;
  if (next_ready == ready.size()) {
    if (alive == 0) {
      me = nullptr;
      void* nowhere;
      switch_to(&nowhere, main_stack);
    }
    std::map<std::string, int> where;
    for (auto& t : threads)
      if (!t.done && t.wait) where[place(t.file, t.line)]++;
    std::string message = "deadlock in block " + std::to_string(block_number) + ":";
    for (auto& one : where) message += " " + std::to_string(one.second) + " threads wait at " + one.first + ";";
    die(message);
  }
  Thread* next = ready[next_ready++];
  if (next_ready > 65536) {
    ready.erase(ready.begin(), ready.begin() + static_cast<long>(next_ready));
    next_ready = 0;
  }
  if (next == self) return;
  me = next;
  switch_to(&self->stack, next->stack);
}
inline void run_thread() {
  (*body)();
  me->done = true;
  alive--;
  unsigned here = --alive_in[me->warp];
  if (alive && block_meeting.arrived == alive) finish(block_meeting);
  Warp& w = warps[me->warp];
  if (here && w.sync.arrived == here) finish(w.sync);
  go_on();
  abort();
}
inline void launch(dim3 g, dim3 b, size_t bytes, const std::function<void()>& kernel) {
  begin_launch(g, b, bytes);
  body = &kernel;
  while (stacks.size() < num_threads) {
    void* fresh = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) die("out of memory");
    stacks.push_back(static_cast<char*>(fresh));
  }
  for (unsigned number : block_order()) {
    begin_block(number, bytes);
    warps.assign((num_threads + 31) / 32, {});
    alive_in.assign(warps.size(), 0);
    block_meeting = {};
    alive = num_threads;
    ready.clear();
    next_ready = 0;
    for (unsigned i = 0; i < num_threads; i++) {
      begin_thread(i);
      alive_in[i / 32]++;
      void** top = reinterpret_cast<void**>(stacks[i] + STACK);
      top[-1] = nullptr;
      top[-2] = reinterpret_cast<void*>(&run_thread);
      for (int k = 3; k <= 8; k++) top[-k] = nullptr;
      threads[i].stack = top - 8;
      ready.push_back(&threads[i]);
    }
    if (shuffled) std::shuffle(ready.begin(), ready.end(), random_order);
    me = ready[next_ready++];
    switch_to(&main_stack, me->stack);
    after_block();
  }
  free(shared);
}

}  // namespace simt
