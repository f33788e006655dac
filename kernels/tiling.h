// What register tiles cost, and which to take: a small model of the CPU.
#pragma once
#include "share.h"

namespace afds {

// Time of one product step of an r x v tile, in units of one fused multiply-add a cycle: two of them and two loads
// start each cycle, an unaligned load counts twice, and a sum waits four cycles for its last.
inline float step_cost(int r, int v) {
  return std::max({r * v * 0.5f, (r + 2 * v + 2) * 0.5f, 4.0f}) + 0.25f;
}

// Cycles that a cache line costs beside the product: of features that another core has just written, and of weights,
// whose rows lie far apart. Measured with two threads on ResNet-50.
constexpr float kFarPixels = 4.0f, kFarWeights = 16.0f;

// Floats of weights that stay in the first cache beside what else is read.
constexpr int kNear = 4096;

// Floats of pixels that stay in the second cache while rows of weights pass by; the fewest steps that are worth bringing
// the sums in and out once more.
constexpr int kSecond = 64 * 1024, kFewestSteps = 256;

// Of a layer whose channels are lanes: cycles to bring one output into its plane, and how much faster such a layer's
// product has to look: on a Zen 3, 4 x 4 maps looked 1.46 times as fast and were level, 3 x 3 maps 1.65 times and were
// faster.
constexpr float kTransposed = 3.0f, kWorth = 1.5f;

struct Split {
  int rows, vecs;
  float cost;
};

// Parts of nearly equal size: how a count is cut into at most `most` at a time.
inline float parts_cost(int total, int most, int other, bool rows) {
  const int parts = (total + most - 1) / most, small = total / parts, large = total - small * parts;
  auto one = [&](int n) { return rows ? step_cost(n, other) : step_cost(other, n); };
  return large * (large ? one(small + 1) : 0.0f) + (parts - large) * one(small);
}

// unit: 2 where rows go in pairs, of which none is to be cut, else 1.
inline Split best_split(const Table &table, int rows, int vecs, int unit = 1) {
  Split best{1, 1, 1e30f};
  for (int r = unit; r <= std::min(rows, kMaxRows); r += unit) {
    int most = 0;
    for (int v = 1; v <= kMaxVecs; ++v)
      if (table.tile[kPlain][r][v]) most = v;
    if (!most) continue;
    const int row_parts = (rows + r - 1) / r, small = rows / unit / row_parts, large = rows / unit - small * row_parts;
    float cost = (row_parts - large) * parts_cost(vecs, most, small * unit, false);
    if (large) cost += large * parts_cost(vecs, most, (small + 1) * unit, false);
    if (cost < best.cost) best = {r, most, cost};
  }
  return best;
}

}  // namespace afds
