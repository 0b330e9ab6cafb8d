// Compiled for the baseline, like everything outside the families: it must run before a processor is known.
#include "dispatch.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace di4c::cpu {
namespace {

struct Kernels {
  const char* name;
  bool (*supported)();
  void (*random_bits)(const RandomBitsArgs&, int);
  void (*sample)(const SampleArgs&, int);
  void (*sample_product)(const ProductArgs&, int);
  void (*reveal)(const RevealArgs&, int);
  void (*mixture_positions)(const MixtureArgs&, int);
  void (*mixture_finish)(const MixtureArgs&, int);
  void (*mixture_backward)(const MixtureBackwardArgs&, int);
  void (*row_loss)(const RowLossArgs&, int);
  void (*row_loss_backward)(const RowLossBackwardArgs&, int);
};

#define DI4C_KERNELS(isa, supported)                                                                           \
  {                                                                                                            \
#isa, supported, isa::random_bits, isa::sample, isa::sample_product, isa::reveal, isa::mixture_positions,      \
        isa::mixture_finish, isa::mixture_backward, isa::row_loss, isa::row_loss_backward                      \
  }

// __builtin_cpu_supports also asks whether the system saves the registers. Every processor with AVX2 has F16C.
const Kernels kBuilt[] = {  // widest first
#ifdef DI4C_HAS_AVX512
    DI4C_KERNELS(avx512, [] {
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    }),
#endif
#ifdef DI4C_HAS_AVX2
    DI4C_KERNELS(avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
#endif
#ifdef DI4C_HAS_NEON
    DI4C_KERNELS(neon, [] { return true; }),
#endif
#ifdef DI4C_HAS_BASELINE
    DI4C_KERNELS(baseline, [] { return true; }),
#endif
};

const Kernels& widest() {
  static const Kernels* found = [] {
    for (const Kernels& k : kBuilt)
      if (k.supported()) return &k;
    return static_cast<const Kernels*>(nullptr);
  }();
  if (!found) throw std::runtime_error("di4c_ext: no instruction set that was built runs on this processor");
  return *found;
}

const Kernels& active() {
  const char* forced = std::getenv("DI4C_ISA");
  if (!forced || !*forced) return widest();
  const std::string wanted = forced;
  std::string names;
  for (const Kernels& k : kBuilt) {
    if (k.name == wanted && k.supported()) return k;
    if (k.supported()) names += (names.empty() ? "" : ", ") + std::string(k.name);
  }
  throw std::invalid_argument("DI4C_ISA=" + wanted +
                              " is no instruction set that is built and runs here; unset it or use one of: " + names);
}

// A gradient lies in memory fresh from the system, and a fault for each of its 4 KiB pages costs several times what
// writing it does. Asks for 2 MiB pages instead, where the system leaves that to the program; a refusal costs nothing.
template <typename BackwardArgs>
const BackwardArgs& with_huge_pages(const BackwardArgs& a) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kWorthwhile = size_t{4} << 20;
  const int64_t row = a.logits.dtype == kLogistic ? 8 : a.S * (a.logits.dtype == kFloat32 ? 4 : 2);
  const size_t size = static_cast<size_t>(a.B * a.L * a.D * row);
  if (size >= kWorthwhile && a.grad != a.logits.data) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), start = reinterpret_cast<uintptr_t>(a.grad);
    const uintptr_t first = (start + page - 1) / page * page;
    (void)madvise(reinterpret_cast<void*>(first), start + size - first, MADV_HUGEPAGE);
  }
#endif
  return a;
}

}  // namespace

std::vector<std::string> isas_built() {
  std::vector<std::string> names;
  for (const Kernels& k : kBuilt) names.emplace_back(k.name);
  return names;
}

std::string isa_active() { return active().name; }

void random_bits(const RandomBitsArgs& a, int threads) { active().random_bits(a, threads); }
void sample(const SampleArgs& a, int threads) { active().sample(a, threads); }
void sample_product(const ProductArgs& a, int threads) { active().sample_product(a, threads); }
void reveal(const RevealArgs& a, int threads) { active().reveal(a, threads); }
void mixture_positions(const MixtureArgs& a, int threads) { active().mixture_positions(a, threads); }
void mixture_finish(const MixtureArgs& a, int threads) { active().mixture_finish(a, threads); }
void mixture_backward(const MixtureBackwardArgs& a, int threads) {
  active().mixture_backward(with_huge_pages(a), threads);
}
void row_loss(const RowLossArgs& a, int threads) { active().row_loss(a, threads); }
void row_loss_backward(const RowLossBackwardArgs& a, int threads) {
  active().row_loss_backward(with_huge_pages(a), threads);
}

}  // namespace di4c::cpu
