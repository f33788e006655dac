#include "dispatch.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "memory.h"

#if defined(AFDS_AMX)
#include <cpuid.h>
#endif

namespace afds {

namespace {

#if defined(__x86_64__) || defined(_M_X64)
bool has_dot() { return __builtin_cpu_supports("avx512bf16"); }
bool has_pick() { return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt"); }
bool has_amx() {
#if defined(AFDS_AMX)
  static const bool granted = [] {
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kState = 3u << 17;
    unsigned a, b, c, d;
    if (!has_dot() || !has_pick() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTiles)) return false;
    unsigned low, high;  // what the operating system saves: avx512_bf16 says that this may be asked
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kState) == kState && request_amx();
  }();
  return granted;
#else
  return false;
#endif
}
#endif

// Seconds of one middling tile, all of it in the first cache.
double time_tile(TileFn tile) {
  constexpr int kRows = 6, kVecs = 4, kSteps = 128, kPlane = kVecs * 16;
  Floats x(kPlane * 8), w(kSteps), out(kPlane * kRows);
  std::vector<uint32_t> mask(kPlane, 0);
  std::vector<int32_t> xoff(kSteps + kAhead), woff(kSteps + kAhead);
  for (int i = 0; i < kSteps; ++i) xoff[i] = i % 8 * kPlane, woff[i] = i;
  const float *rows[kRows], *fetch[8] = {};
  float *outs[kRows], factor[kRows] = {};
  for (int r = 0; r < kRows; ++r) rows[r] = w.data(), outs[r] = out.data() + r * kPlane;
  Tile t{};
  t.x = x.data(), t.xoff = xoff.data(), t.woff = woff.data(), t.steps = kSteps, t.w = rows, t.scale = t.shift = factor;
  t.out = outs, t.mask = mask.data(), t.fetch = fetch;
  double best = 1.0;
  for (int i = 0; i < 20; ++i) {  // the least of many: something else may run in between
    const auto start = std::chrono::steady_clock::now();
    tile(t);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

const AmxTable *choose_amx(const std::string &isa) {
#if defined(AFDS_AMX)
  if ((isa == "auto" || isa == kAmx.name) && has_amx()) return &kAmx;
#endif
  (void)isa;
  return nullptr;
}

const PairTable &choose_pairs(const std::string &isa, const Table &table) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kPairsDot.name) return kPairsDot;
  if (&table == &kTableAvx512) {
    // Some CPUs do 32 products an instruction in half the time of 16 in float32, others in four times as much.
    if ((isa == "auto" || choose_amx(isa)) && has_dot() &&
        time_tile(kPairsDot.tile[kPlain][6][4]) < time_tile(kPairsAvx512.tile[kPlain][6][4]))
      return kPairsDot;
    return kPairsAvx512;
  }
  if (&table == &kTableAvx2) return kPairsAvx2;
#endif
  (void)isa, (void)table;
  return kPairsBase;
}

void pick(uint16_t *to, const uint16_t *from, int n, const uint32_t *on, const int32_t *list, int picked) {
#if defined(__x86_64__) || defined(_M_X64)
  static const bool fast = has_pick();
  if (fast) return pick_vbmi2(to, from, n, on);
#endif
  (void)n, (void)on;
  for (int i = 0; i < picked; ++i) to[i] = from[list[i]];
}

std::vector<std::string> usable_tables(bool bf16) {
  std::vector<std::string> names;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
#if defined(AFDS_AMX)
  if (bf16 && has_amx()) names.push_back(kAmx.name);
#endif
  if (bf16 && has_dot()) names.push_back(kPairsDot.name);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    names.push_back(kTableAvx512.name);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back(kTableAvx2.name);
#endif
  names.push_back(kTableBase.name);
  return names;
}

const Table &choose_table(const std::string &isa, bool bf16) {
  const auto usable = usable_tables(bf16);
  const std::string name = isa == "auto" ? usable_tables(false).front() : isa;
  if (std::find(usable.begin(), usable.end(), name) != usable.end()) {
#if defined(__x86_64__) || defined(_M_X64)
    if (name == kTableAvx512.name || name == kPairsDot.name || choose_amx(name)) return kTableAvx512;
    if (name == kTableAvx2.name) return kTableAvx2;
#endif
    return kTableBase;
  }
  std::string all;
  for (const auto &n : usable) all += (all.empty() ? "" : ", ") + n;
  throw std::invalid_argument("this CPU cannot run the instruction set " + isa + "; it can run: " + all);
}

}  // namespace afds
