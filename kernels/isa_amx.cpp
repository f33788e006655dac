// The product of pairs on AMX's eight registers of 16 rows by 64 bytes.
//
//      C  16 rows x 16 pixels, float32      2 x 2 of them are summed at once
//      A  16 rows x 32 input channels       weights, packed when the plan is read
//      B  16 pairs x 16 pixels              planes of pairs as they lie, or a panel: taps side by side
//
// One instruction is 8,192 products in 16 cycles. It takes as long with fewer input channels, so taps of few channels share
// a block in the panel; and reading B takes six times as long where its rows cross cache lines, as a tap's do, so the panel is
// copied once for all rows. What is left is bringing the sums out: scale, shift, residual, activation, rounding.
#define AFDS_LANES 16
#define AFDS_DOT
#include "vector.inl"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace afds {
namespace {

struct Config {  // Intel's layout of a tile configuration
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void panel(uint32_t *to, const uint32_t *from, const int32_t *xoff, int steps, int padded, int vecs) {
  for (int v = 0; v < vecs; ++v, from += kAmxVec) {
    for (int s = 0; s < steps; ++s, to += kAmxVec)
      store(reinterpret_cast<float *>(to), load(reinterpret_cast<const float *>(from + xoff[s])));
    for (int s = steps; s < padded; ++s, to += kAmxVec) store(reinterpret_cast<float *>(to), set1(0.0f));
  }
}

enum Residual { kNoResidual, kResidualFloats, kResidualHalves, kResidualPairs };

// Brings V registers of rows from `row` on, whose sums lie in `sums`, to where they belong. ACT: kNone, kRelu, or what j says.
template <int V, int RESIDUAL, int ACT>
void finish(const AmxJob &j, const float *sums, int row, int64_t at) {
  const int end = row + j.rows < j.channels ? row + j.rows : j.channels, act = j.act;
  const float *const scales = j.scale, *const shifts = j.shift;  // copies: what is stored might else be a field of j
  float *const *const out = j.out, *const *const totals = j.sum;
  uint32_t *const *const words = j.words;
  const Half *const halves = j.half;
  const float *const *const res = j.res;
  const Half *const res_half = j.res_half;
  const uint32_t *const *const res_words = j.res_words;
  const vf zero = set1(0.0f);
  vf mask[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) mask[v] = load(reinterpret_cast<const float *>(j.mask + at + v * kAmxVec));
  auto one_row = [&](vf (&part)[V], const float *sum, int k, bool upper) __attribute__((always_inline)) {
    const vf scale = set1(scales[k]), shift = set1(shifts[k]);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vf t = load(sum + v * kAmxRows * kAmxVec) * scale + shift;
      if (RESIDUAL == kResidualFloats) t += load(res[k] + at + v * kAmxVec);
      if (RESIDUAL == kResidualHalves) t += half_of(res_half[k].words + at + v * kAmxVec, 16 - res_half[k].shift);
      if (RESIDUAL == kResidualPairs) t += half_of(res_words[k / 2] + at + v * kAmxVec, upper ? 0 : 16);
      t = ACT == kNone ? t : ACT == kRelu ? vmax(zero, t) : apply(t, act);
      part[v] = reinterpret_cast<vf>(reinterpret_cast<vi>(t) & reinterpret_cast<vi>(mask[v]));
      if (out) store(out[k] + at + v * kAmxVec, part[v]);
      if (halves) store_half(halves[k].words + at + v * kAmxVec, part[v], halves[k].keep, halves[k].shift);
    }
    if (totals) add_sum(totals[k], V == 1 ? part[0] : part[0] + part[V - 1]);
  };
  for (; row + 1 < end; row += 2, sums += 2 * kAmxVec) {
    vf lower[V], upper[V];
    one_row(lower, sums, row, false);
    one_row(upper, sums + kAmxVec, row + 1, true);
    if (!words) continue;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store_pair(words[row / 2] + at + v * kAmxVec, lower[v], upper[v]);
  }
  if (row < end) {  // the last channel of an odd number
    vf lower[V];
    one_row(lower, sums, row, false);
    for (int v = 0; v < V && words; ++v) store_pair(words[row / 2] + at + v * kAmxVec, lower[v], zero);
  }
}

template <int V, int RESIDUAL>
void finish(const AmxJob &j, const float *sums, int row, int64_t at) {
  if (j.act == kRelu) finish<V, RESIDUAL, kRelu>(j, sums, row, at);
  else if (j.act == kNone) finish<V, RESIDUAL, kNone>(j, sums, row, at);
  else finish<V, RESIDUAL, kRelu6>(j, sums, row, at);
}

template <int V>
void finish(const AmxJob &j, const float *sums, int row, int64_t at) {
  if (j.res) finish<V, kResidualFloats>(j, sums, row, at);
  else if (j.res_words) finish<V, kResidualPairs>(j, sums, row, at);
  else if (j.res_half) finish<V, kResidualHalves>(j, sums, row, at);
  else finish<V, kNoResidual>(j, sums, row, at);
}

constexpr int kSums = kAmxRows * kAmxVec;  // of one register

// The sums of R row tiles by V vectors of pixels, to `sums` [R][V][kSums].
template <int R, int V>
void multiply(const AmxJob &j, int tile, int vec, float *sums) {
  const uint16_t *a = j.a + tile * j.a_tile;
  const uint32_t *b = j.b + (vec - j.vec_first) * j.vec;
  const int64_t pair = j.pair * 4, row = j.a_row * 2;  // bytes
  constexpr int64_t kOut = kAmxVec * sizeof(float);
  _tile_zero(0);
  if (V > 1) _tile_zero(1);
  if (R > 1) _tile_zero(2);
  if (R > 1 && V > 1) _tile_zero(3);
  for (int k = 0; k < j.blocks; ++k, a += j.a_block) {
    const uint32_t *from = b + j.block[k];
    _tile_loadd(4, a, row);
    _tile_loadd(6, from, pair);
    _tile_dpbf16ps(0, 4, 6);
    if (R > 1) {
      _tile_loadd(5, a + j.a_tile, row);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (V > 1) {
      _tile_loadd(7, from + j.vec, pair);
      _tile_dpbf16ps(1, 4, 7);
      if (R > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kOut);
  if (V > 1) _tile_stored(1, sums + kSums, kOut);
  if (R > 1) _tile_stored(2, sums + V * kSums, kOut);
  if (R > 1 && V > 1) _tile_stored(3, sums + 3 * kSums, kOut);
}

struct Block {
  int rows = 0, vecs = 0, tile, vec;  // rows, vecs: registers; none yet where rows is 0
};

void multiply(const AmxJob &j, const Block &b, float *sums) {
  if (b.rows == 2) b.vecs == 2 ? multiply<2, 2>(j, b.tile, b.vec, sums) : multiply<2, 1>(j, b.tile, b.vec, sums);
  else b.vecs == 2 ? multiply<1, 2>(j, b.tile, b.vec, sums) : multiply<1, 1>(j, b.tile, b.vec, sums);
}

void finish(const AmxJob &j, const Block &b, const float *sums) {
  for (int r = 0; r < b.rows; ++r, sums += b.vecs * kSums) {
    const int row = (b.tile + r) * j.rows;
    const int64_t at = int64_t(b.vec) * kAmxVec;
    b.vecs == 2 ? finish<2>(j, sums, row, at) : finish<1>(j, sums, row, at);
  }
}

// What `finish` will read and write.
void fetch(const AmxJob &j, const Block &b) {
  const int64_t at = int64_t(b.vec) * kAmxVec;
  const int first = b.tile * j.rows, end = first + b.rows * j.rows < j.channels ? first + b.rows * j.rows : j.channels;
  for (int k = first; k < end; k += 2)
    for (int v = 0; v < b.vecs; ++v) {
      if (j.words) __builtin_prefetch(j.words[k / 2] + at + v * kAmxVec, 1);
      if (j.res_words) __builtin_prefetch(j.res_words[k / 2] + at + v * kAmxVec);
    }
}

void configure(int rows, int depth) {
  Config config;
  for (int i = 0; i < 6; ++i) config.rows[i] = uint8_t(rows), config.bytes[i] = uint16_t(i < 4 ? kAmxVec * 4 : depth * 4);
  for (int i = 6; i < 8; ++i) config.rows[i] = uint8_t(depth), config.bytes[i] = kAmxVec * 4;
  asm volatile("ldtilecfg %0" ::"m"(config));  // GCC 12's own function does not say that it reads all of it
}

void release() { _tile_release(); }

// One block's sums are brought out while the next one's are made: these are other units of the core.
void product(const AmxJob &j) {
  alignas(64) float sums[2][4 * kSums];
  Block last;
  int turn = 0;
  for (int tile = j.row_begin; tile < j.row_end; tile += 2)
    for (int vec = j.vec_begin; vec < j.vec_end; vec += 2) {
      const Block next{j.row_end - tile < 2 ? 1 : 2, j.vec_end - vec < 2 ? 1 : 2, tile, vec};
      fetch(j, next);
      multiply(j, next, sums[turn]);
      turn ^= 1;
      if (last.rows) finish(j, last, sums[turn]);
      last = next;
    }
  if (last.rows) finish(j, last, sums[turn ^ 1]);
}

}  // namespace

extern const AmxTable kAmx = {"amx_bf16", panel, configure, product, release};

bool request_amx() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace afds
