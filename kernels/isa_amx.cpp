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

void panel(uint32_t *to, const uint32_t *from, const int32_t *xoff, int steps, int vecs) {
  for (int v = 0; v < vecs; ++v, from += kAmxVec)
    for (int s = 0; s < steps; ++s, to += kAmxVec)
      store(reinterpret_cast<float *>(to), load(reinterpret_cast<const float *>(from + xoff[s])));
}

enum Residual { kNoResidual, kResidualFloats, kResidualHalves };

// Brings V registers of rows from `row` on, whose sums lie in `sums`, to where they belong.
template <int V, int RESIDUAL>
void finish(const AmxJob &j, const float *sums, int row, int64_t at) {
  const int end = row + j.rows < j.channels ? row + j.rows : j.channels;
  const vf zero = set1(0.0f);
  for (; row < end; row += 2, sums += 2 * kAmxVec) {
    const int rows = end - row < 2 ? 1 : 2;
    vf part[2][V];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      if (r == rows) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) part[r][v] = zero;
        break;
      }
      const vf scale = set1(j.scale[row + r]), shift = set1(j.shift[row + r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        part[r][v] = load(sums + v * kAmxRows * kAmxVec + r * kAmxVec) * scale + shift;
      if (RESIDUAL == kResidualFloats) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) part[r][v] += load(j.res[row + r] + at + v * kAmxVec);
      }
      if (RESIDUAL == kResidualHalves) {
        const Half &res = j.res_half[row + r];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) part[r][v] += half_of(res.words + at + v * kAmxVec, 16 - res.shift);
      }
      if (j.act == kRelu) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) part[r][v] = vmax(zero, part[r][v]);
      } else if (j.act != kNone) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) part[r][v] = apply(part[r][v], j.act);
      }
      vf total = zero;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        part[r][v] = masked(part[r][v], j.mask + at + v * kAmxVec);
        total += part[r][v];
        if (j.out) store(j.out[row + r] + at + v * kAmxVec, part[r][v]);
      }
      if (j.sum) add_sum(j.sum[row + r], total);
    }
    if (j.words) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store_pair(j.words[row / 2] + at + v * kAmxVec, part[0][v], part[1][v]);
    }
  }
}

template <int V>
void finish(const AmxJob &j, const float *sums, int row, int64_t at) {
  if (j.res) finish<V, kResidualFloats>(j, sums, row, at);
  else if (j.res_half) finish<V, kResidualHalves>(j, sums, row, at);
  else finish<V, kNoResidual>(j, sums, row, at);
}

// R row tiles by V vectors of pixels.
template <int R, int V>
void block(const AmxJob &j, int tile, int vec) {
  alignas(64) float sums[R][V][kAmxRows * kAmxVec];
  const int64_t tile_halves = int64_t(j.rows) * 2 * kAmxDepth, of_tile = tile_halves * j.blocks;
  const uint16_t *a = j.a + tile * of_tile;
  const uint32_t *b = j.b + (vec - j.vec_first) * j.vec;
  const int64_t pair = j.pair * 4;
  constexpr int64_t kRow = 2 * kAmxDepth * sizeof(uint16_t), kOut = kAmxVec * sizeof(float);
  _tile_zero(0);
  if (V > 1) _tile_zero(1);
  if (R > 1) _tile_zero(2);
  if (R > 1 && V > 1) _tile_zero(3);
  for (int k = 0; k < j.blocks; ++k, a += tile_halves) {
    const uint32_t *from = b + j.block[k];
    _tile_loadd(4, a, kRow);
    _tile_loadd(6, from, pair);
    _tile_dpbf16ps(0, 4, 6);
    if (R > 1) {
      _tile_loadd(5, a + of_tile, kRow);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (V > 1) {
      _tile_loadd(7, from + j.vec, pair);
      _tile_dpbf16ps(1, 4, 7);
      if (R > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0][0], kOut);
  if (V > 1) _tile_stored(1, sums[0][V - 1], kOut);
  if (R > 1) _tile_stored(2, sums[R - 1][0], kOut);
  if (R > 1 && V > 1) _tile_stored(3, sums[R - 1][V - 1], kOut);
  for (int r = 0; r < R; ++r) finish<V>(j, sums[r][0], (tile + r) * j.rows, int64_t(vec) * kAmxVec);
}

void product(const AmxJob &j) {
  Config config;
  for (int i = 0; i < 4; ++i) config.rows[i] = uint8_t(j.rows), config.bytes[i] = kAmxVec * 4;
  for (int i = 4; i < 6; ++i) config.rows[i] = uint8_t(j.rows), config.bytes[i] = uint16_t(j.depth * 4);
  for (int i = 6; i < 8; ++i) config.rows[i] = uint8_t(j.depth), config.bytes[i] = kAmxVec * 4;
  _tile_loadconfig(&config);
  for (int tile = j.row_begin; tile < j.row_end; tile += 2) {
    const bool two = tile + 1 < j.row_end;
    int vec = j.vec_begin;
    for (; vec + 1 < j.vec_end; vec += 2) two ? block<2, 2>(j, tile, vec) : block<1, 2>(j, tile, vec);
    if (vec < j.vec_end) two ? block<2, 1>(j, tile, vec) : block<1, 1>(j, tile, vec);
  }
  _tile_release();
}

}  // namespace

extern const AmxTable kAmx = {"amx_bf16", panel, product};

bool request_amx() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace afds
