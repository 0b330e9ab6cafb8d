#include "simt.h"

#include "context.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <numeric>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

namespace {

constexpr size_t kGuardBytes = 4096;
constexpr unsigned kTogether = 8;  // CTAs that run interleaved, where they may
enum class State { kReady, kAtCta, kAtCluster, kAtWarp, kDone };

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

struct SharedVariable {
  Site site;
  char* data;
  size_t bytes;
};

// A place where one CTA after another runs; what one leaves in shared memory the next one finds, as on a GPU.
struct Cta {
  uint3 index;
  unsigned done = 0, arrived = 0;
  bool flag_in = false, flag_out = false;
  Site site = {};
  std::vector<SharedVariable> shared;
};

struct Cluster {
  unsigned done = 0, arrived = 0;
  Site site = {};
};

const Site kDynamic = {"dynamic shared memory", 0};

std::vector<Fiber> fibers;  // count to a CTA
std::vector<Warp> warps;
std::vector<Cta> ctas;
std::vector<Cluster> clusters;
std::deque<unsigned> ready;
unsigned current, count, per_cluster;
bool alone, interleaved;  // alone: the kernel has static variables for shared memory
size_t dynamic_bytes;
uint64_t order_seed, random_state;
const std::function<void()>* body;
Context scheduler;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

Cta& own_cta() { return ctas[current / count]; }
Cluster& own_cluster() { return clusters[current / count / per_cluster]; }

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

void draw_ranks(unsigned first_thread, unsigned threads) {
  for (unsigned w = first_thread / kWarp; w < (first_thread + threads) / kWarp; ++w) warps[w].rank = random_word();
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
  blockIdx = own_cta().index;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fibers[i].stack, kStackBytes);
  simt_switch(&scheduler, &fibers[i].context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  fibers[current].state = State::kDone;
  Cta& cta = own_cta();
  if (++cta.done == count) {
    for (SharedVariable& v : cta.shared) ASAN_POISON_MEMORY_REGION(v.data, v.bytes);
    ++own_cluster().done;
  }
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

// One of `expected` threads from `first` on has come to a barrier; true for the last, which wakes the others.
bool arrive(unsigned& arrived, Site& barrier, Site site, unsigned first, unsigned expected) {
  if (arrived > 0 && site != barrier)
    fail("divergent barrier: thread %u at %s:%d, others at %s:%d", current % count, site.file, site.line, barrier.file,
         barrier.line);
  barrier = site;
  if (++arrived < expected) return false;
  arrived = 0;
  draw_ranks(first, expected);
  for (unsigned i = 0; i < expected; ++i) wake(first + i);
  return true;
}

[[noreturn]] void report_stuck() {
  std::string text;
  for (unsigned i = 0; i < ctas.size() * count; ++i) {
    const Fiber& f = fibers[i];
    if (i > 0 && fibers[i - 1].state == f.state && !(fibers[i - 1].site != f.site)) continue;
    const uint3 cta = ctas[i / count].index;
    text += "\n  from thread " + std::to_string(i % count) + " of CTA (" + std::to_string(cta.x) + ", " +
            std::to_string(cta.y) + ", " + std::to_string(cta.z) + "): ";
    if (f.state == State::kDone) {
      text += "left the kernel";
    } else {
      text += std::string(f.state == State::kAtCta       ? "at a barrier, "
                          : f.state == State::kAtCluster ? "at a cluster barrier, "
                                                         : "at a warp operation, ") +
              f.site.file + ":" + std::to_string(f.site.line);
    }
  }
  fail("divergent barrier: not all threads reach it%s", text.c_str());
}

void make_room(unsigned resident) {
  const size_t threads = size_t{resident} * per_cluster * count;
  while (fibers.size() < threads) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) fail("no memory for stacks");
    fibers.emplace_back();
    fibers.back().stack = static_cast<char*>(memory) + kGuardBytes;
  }
  warps.resize(std::max(warps.size(), threads / kWarp));
  ctas.resize(size_t{resident} * per_cluster);
  clusters.resize(resident);
}

void start_cluster(unsigned place, uint64_t number, dim3 grid) {
  clusters[place] = {};
  draw_ranks(place * per_cluster * count, per_cluster * count);
  for (unsigned r = 0; r < per_cluster; ++r) {
    Cta& cta = ctas[place * per_cluster + r];
    const uint64_t i = number * per_cluster + r;
    cta.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                 static_cast<unsigned>(i / grid.x / grid.y)};
    cta.done = cta.arrived = 0;
    cta.flag_in = false;
    for (SharedVariable& v : cta.shared) ASAN_UNPOISON_MEMORY_REGION(v.data, v.bytes);
    for (unsigned t = 0; t < count; ++t) {
      const unsigned i_fiber = (place * per_cluster + r) * count + t;
      Fiber& f = fibers[i_fiber];
      f.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
      warps[i_fiber / kWarp].arrived = 0;
      prepare(f.context, f.stack, fiber_main);
      wake(i_fiber);
    }
  }
}

void run_one() {
  if (ready.empty()) report_stuck();
  std::swap(ready.front(), ready[pick_ready()]);
  const unsigned i = ready.front();
  ready.pop_front();
  to_fiber(i);
}

}  // namespace

void set_order(uint64_t seed) { order_seed = random_state = seed; }

unsigned lane() { return current % kWarp; }

unsigned rank_in_cluster() { return current / count % per_cluster; }

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

void run_grid(dim3 grid, dim3 block, unsigned cluster, size_t dynamic, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  body = &thread;
  count = block.x * block.y * block.z;
  per_cluster = cluster;
  dynamic_bytes = dynamic;
  alone = false;
  if (count % kWarp != 0) fail("a CTA of %u threads is not made of whole warps", count);
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z / cluster);
  std::iota(order.begin(), order.end(), 0);
  for (uint64_t i = order.size(); order_seed && i > 1; --i) std::swap(order[i - 1], order[random_word() % i]);

  unsigned together = order_seed ? std::max(1u, std::min(kTogether / cluster, 3u)) : 1;
  together = static_cast<unsigned>(std::min<uint64_t>(together, order.size()));
  ready.clear(), ctas.clear();
  make_room(together);
  interleaved = false;
  start_cluster(0, order[0], grid);
  run_one();  // after which it is known whether its CTAs must be alone
  if (alone) together = 1;
  interleaved = together > 1;
  uint64_t next = 1;
  for (; next < together; ++next) start_cluster(static_cast<unsigned>(next), order[next], grid);
  for (unsigned active = together; active > 0;) {
    run_one();
    const unsigned place = current / count / per_cluster;
    if (clusters[place].done < per_cluster) continue;
    clusters[place].done = 0;
    if (next < order.size()) {
      start_cluster(place, order[next++], grid);
    } else {
      --active;
    }
  }
  for (Cta& cta : ctas) {
    for (SharedVariable& v : cta.shared) {
      ASAN_UNPOISON_MEMORY_REGION(v.data, v.bytes);
      free(v.data);
    }
  }
}

bool meet_cta(bool flag, Site site) {
  Cta& cta = own_cta();
  cta.flag_in = cta.flag_in || flag;
  const bool last = arrive(cta.arrived, cta.site, site, current / count * count, count);
  if (last) {
    cta.flag_out = cta.flag_in;  // read by all before they can meet again
    cta.flag_in = false;
  }
  const unsigned mine = current / count;
  wait(last ? State::kReady : State::kAtCta, site);
  return ctas[mine].flag_out;
}

void meet_cluster(Site site) {
  Cluster& cluster = own_cluster();
  const unsigned threads = per_cluster * count;
  const bool last = arrive(cluster.arrived, cluster.site, site, current / threads * threads, threads);
  wait(last ? State::kReady : State::kAtCluster, site);
}

const uint64_t* meet_warp(uint64_t value, unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail("%s:%d: only whole warps may meet, got mask %08x", site.file, site.line, mask);
  const unsigned first = current / kWarp * kWarp, number = current / kWarp;
  Warp& warp = warps[number];
  if (warp.arrived > 0 && site != warp.site)
    fail("divergent warp operation: thread %u at %s:%d, others at %s:%d", current % count, site.file, site.line,
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
  return warps[number].outgoing;
}

void pause() {
  if (!order_seed) return;
  ready.push_back(current);
  to_scheduler(false);
}

void* shared(Site site, size_t bytes) {
  Cta& cta = own_cta();
  for (SharedVariable& v : cta.shared)
    if (!(v.site != site) && v.bytes == bytes) return v.data;
  char* data = static_cast<char*>(malloc(std::max<size_t>(bytes, 1)));
  std::fill(data, data + bytes, static_cast<char>(0xcd));
  cta.shared.push_back({site, data, bytes});
  return data;
}

void* dynamic_shared() { return shared(kDynamic, dynamic_bytes); }

void* in_peer(const void* p, unsigned rank) {
  if (rank >= per_cluster) fail("a cluster of %u CTAs has none of rank %u", per_cluster, rank);
  const char* wanted = static_cast<const char*>(p);
  for (const SharedVariable& mine : own_cta().shared) {
    if (wanted < mine.data || wanted > mine.data + mine.bytes) continue;
    for (const SharedVariable& v : ctas[current / count / per_cluster * per_cluster + rank].shared)
      if (!(v.site != mine.site) && v.bytes == mine.bytes) return v.data + (wanted - mine.data);
    fail("the shared memory of CTA %u of a cluster was used before that CTA had started", rank);
  }
  fail("no shared memory of this CTA lies at %p", p);
}

bool run_alone() {
  if (per_cluster > 1 || interleaved) fail("CTAs that run together need shared memory by SIMT_SHARED");
  return alone = true;
}

}  // namespace simt
