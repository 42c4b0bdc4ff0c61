#include "kernels.h"
#include "paths/target.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace manylora {
namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx2_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx2_vnni() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif
bool always() { return true; }

struct Path {
  const Kernels* (*table)();
  bool (*is_supported)();
  int number;
  // Built to run on AVX2 instead, for tests: see paths/emulate.h.
  constexpr bool is_emulated() const { return (ML_EMULATED >> number) & 1; }
};
constexpr Path kPaths[] = {
    // best first
    {avx512_bf16_kernels, has_avx512_bf16, ML_AVX512_BF16},
    {avx512_kernels, has_avx512, ML_AVX512},
    {avx2_vnni_kernels, has_avx2_vnni, ML_AVX2_VNNI},
    {avx2_kernels, has_avx2, ML_AVX2},
    {portable_kernels, always, ML_PORTABLE},
};

const Kernels* find(const char* name) {
  bool is_auto = !std::strcmp(name, "auto");
  for (const Path& path : kPaths) {
    const Kernels* table = path.table();
    if (!table || (!is_auto && std::strcmp(name, table->name))) continue;
    if (path.is_emulated() ? !is_auto && has_avx2() : path.is_supported()) return table;
  }
  return nullptr;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> table{find("auto")};
  return table;
}

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

bool is_path_available(const char* name) { return find(name) != nullptr; }

void select_path(const char* name) {
  const Kernels* table = find(name);
  if (!table) throw std::invalid_argument(std::string("this machine cannot run the CPU path '") + name + "'");
  selected().store(table);
}

}  // namespace manylora
