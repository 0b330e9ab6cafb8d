#include "simt.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

namespace {

constexpr size_t kStackBytes = 192 << 10, kGuardBytes = 4096;
enum class State { kReady, kAtCta, kAtWarp, kDone };

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
// Saves the caller's registers and stack pointer, and goes on where `to` was saved. (swapcontext costs two system
// calls each time, and a CTA switches thousands of times.)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void simt_switch(Context* from, const Context* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov (%rsi), %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(entry);  // where `ret` goes; six registers below it
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 6;
}
#else
struct Context {
  ucontext_t saved;
};
void simt_switch(Context* from, const Context* to) { swapcontext(&from->saved, &to->saved); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = kStackBytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}
#endif

struct Fiber {
  char* stack = nullptr;
  Context context;
  State state = State::kDone;
  Site site = {};
  uint3 index;
};

struct Warp {
  unsigned arrived = 0;
  Site site = {};
  uint64_t rank = 0;
  uint64_t incoming[kWarp], outgoing[kWarp];  // outgoing stays until all lanes, having read it, meet again
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::deque<unsigned> ready;
unsigned current, count, done, at_cta;
bool flag_in, flag_out;
Site cta_site;
uint64_t order_seed, random_state;
const std::function<void()>* body;
Context scheduler;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

uint64_t random_word() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// The place in `ready` of the thread to go on. At random, but some warps run far ahead of others, as they may on a
// GPU: of a few threads drawn, the one whose warp has the highest rank. Ranks change at every barrier.
size_t pick_ready() {
  if (!order_seed) return 0;
  size_t best = random_word() % ready.size();
  for (int i = 0; i < 6; ++i) {
    const size_t other = random_word() % ready.size();
    if (warps[ready[other] / kWarp].rank > warps[ready[best] / kWarp].rank) best = other;
  }
  return best;
}

void draw_ranks() {
  for (Warp& warp : warps) warp.rank = random_word();
}

void to_scheduler(bool last) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, scheduler_stack, scheduler_stack_bytes);
  simt_switch(&fibers[current].context, &scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void to_fiber(unsigned i) {
  current = i;
  threadIdx = fibers[i].index;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fibers[i].stack, kStackBytes);
  simt_switch(&scheduler, &fibers[i].context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  fibers[current].state = State::kDone;
  ++done;
  to_scheduler(true);
}

void wake(unsigned i) {
  fibers[i].state = State::kReady;
  ready.push_back(i);
}

void wait(State state, Site site) {
  fibers[current].state = state;
  fibers[current].site = site;
  to_scheduler(false);
}

[[noreturn]] void report_stuck() {
  std::string text;
  for (unsigned i = 0; i < count; ++i) {
    const Fiber& f = fibers[i];
    if (i > 0 && fibers[i - 1].state == f.state && !(fibers[i - 1].site != f.site)) continue;
    text += "\n  from thread " + std::to_string(i) + ": ";
    if (f.state == State::kDone) {
      text += "left the kernel";
    } else {
      text += (f.state == State::kAtCta ? "at a barrier, " : "at a warp operation, ") + std::string(f.site.file) + ":" +
              std::to_string(f.site.line);
    }
  }
  fail("divergent barrier in CTA (%u, %u, %u): not all threads reach it%s", blockIdx.x, blockIdx.y, blockIdx.z,
       text.c_str());
}

void run_cta() {
  done = at_cta = 0;
  flag_in = false;
  for (Warp& warp : warps) warp.arrived = 0;
  ready.clear();
  draw_ranks();
  for (unsigned i = 0; i < count; ++i) {
    Fiber& f = fibers[i];
    f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    prepare(f.context, f.stack, fiber_main);
    wake(i);
  }
  while (done < count) {
    if (ready.empty()) report_stuck();
    std::swap(ready.front(), ready[pick_ready()]);
    const unsigned i = ready.front();
    ready.pop_front();
    to_fiber(i);
  }
}

}  // namespace

void set_order(uint64_t seed) { order_seed = random_state = seed; }

unsigned lane() { return current % kWarp; }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("simt: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  fflush(nullptr);
  std::_Exit(3);
}

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  body = &thread;
  count = block.x * block.y * block.z;
  if (count % kWarp != 0) fail("a CTA of %u threads is not made of whole warps", count);
  while (fibers.size() < count) {
    fibers.emplace_back();
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) fail("no memory for stacks");
    fibers.back().stack = static_cast<char*>(memory) + kGuardBytes;
  }
  warps.resize(count / kWarp);
  const uint64_t ctas = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t n = 0; n < ctas; ++n) {
    const uint64_t i = order_seed % 2 ? ctas - 1 - n : n;
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_cta();
  }
}

bool meet_cta(bool flag, Site site) {
  if (at_cta > 0 && site != cta_site)
    fail("divergent barrier: thread %u at %s:%d, others at %s:%d", current, site.file, site.line, cta_site.file,
         cta_site.line);
  cta_site = site;
  flag_in = flag_in || flag;
  const bool last = ++at_cta == count;
  if (last) {
    flag_out = flag_in;  // read by all before they can meet again
    flag_in = false;
    at_cta = 0;
    draw_ranks();
    for (unsigned i = 0; i < count; ++i) wake(i);
  }
  wait(last ? State::kReady : State::kAtCta, site);
  return flag_out;
}

const uint64_t* meet_warp(uint64_t value, unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail("%s:%d: only whole warps may meet, got mask %08x", site.file, site.line, mask);
  const unsigned first = current / kWarp * kWarp;
  Warp& warp = warps[current / kWarp];
  if (warp.arrived > 0 && site != warp.site)
    fail("divergent warp operation: thread %u at %s:%d, others at %s:%d", current, site.file, site.line,
         warp.site.file, warp.site.line);
  warp.site = site;
  warp.incoming[lane()] = value;
  const bool last = ++warp.arrived == kWarp;
  if (last) {
    warp.arrived = 0;
    std::copy(warp.incoming, warp.incoming + kWarp, warp.outgoing);
    for (unsigned i = 0; i < kWarp; ++i) wake(first + i);
  }
  wait(last ? State::kReady : State::kAtWarp, site);
  return warp.outgoing;
}

}  // namespace simt
