// Which of the kernels' instruction sets this processor has, and the refusal of kernels that need others.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "api.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace megakern {
namespace {

// Has it AMX with bf16, and does the kernel let this process use the tiles? Linux wants to be asked once.
[[maybe_unused]] bool tiles_allowed() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;          // CPUID 7.0, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2), XSTATE component
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

int found() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return 0;
  if (!__builtin_cpu_supports("avx512bf16")) return 1;
  return tiles_allowed() ? 3 : 2;
#else
  return 0;
#endif
}

struct InstructionSet {
  const char *name, *words;
};
constexpr InstructionSet kSets[] = {
    {"avx512", "AVX-512 (F, BW, DQ, VL)"}, {"avx512_bf16", "AVX512-BF16"}, {"amx_bf16", "AMX-BF16"}};

std::atomic<int> most{3};

// The first so many of kSets: each processor that has one has those before it too.
int usable() {
  static const int here = found();
  return std::min(here, most.load(std::memory_order_relaxed));
}

}  // namespace

std::vector<std::string> features() {
  std::vector<std::string> names;
  for (int i = 0; i < usable(); ++i) names.emplace_back(kSets[i].name);
  return names;
}

void require_feature(const char* op, Feature needed) {
  if (usable() > needed) return;
  throw std::runtime_error(std::string(op) + ": needs " + kSets[needed].words +
                           ", which this processor lacks or its system does not allow; features() names what there is");
}

void limit_features(int count) { most = count; }

}  // namespace megakern
