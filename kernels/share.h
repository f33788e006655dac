// How work is cut: between threads, and into parts of nearly equal size.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "table.h"

namespace afds {

struct Share {
  int begin, end;
  int size() const { return end - begin; }
};

inline Share share(int total, int t, int n) {
  return {static_cast<int>(int64_t(total) * t / n), static_cast<int>(int64_t(total) * (t + 1) / n)};
}

inline Share share_lines(int floats, int t, int n) {  // whole cache lines, so that two threads write none in common
  const Share s = share((floats + kRound - 1) / kRound, t, n);
  return {std::min(floats, s.begin * kRound), std::min(floats, s.end * kRound)};
}

// The first boundary from `at` on that does not cut a pair in two: two threads may not write halves of one word.
template <typename PairOf>
int whole(Share all, int at, const PairOf &pair) {
  while (at > all.begin && at < all.end && pair(at) == pair(at - 1)) ++at;
  return at;
}

template <typename PairOf>
Share share_pairs(int total, int t, int n, const PairOf &pair) {
  const Share s = share(total, t, n);
  return {whole({0, total}, s.begin, pair), whole({0, total}, s.end, pair)};
}

struct Steps {  // `total` in `parts` of nearly equal size, the larger ones first; no division in the loop
  int unit, small, larger;
  Steps(int total, int parts, int unit = 1)
      : unit(unit), small(total / unit / parts), larger(total / unit - small * parts) {}
  Share operator[](int i) const {
    const int begin = i * small + std::min(i, larger);
    return {begin * unit, (begin + small + (i < larger)) * unit};
  }
};

constexpr int kChunk = 1024;  // rows of a matrix-vector product handed over at a time
constexpr size_t kSlack = 4 * kRound;  // floats behind each array: the loops over pixels read whole vectors

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// An odd number of cache lines: the taps and rows of a tile, read side by side, would else meet in the same few sets.
inline int odd_lines(int n) { return ((n + kRound - 1) / kRound | 1) * kRound; }

inline void check(bool good, const std::string &what) {
  if (!good) throw std::invalid_argument("plan: " + what);
}

}  // namespace afds
