// What one instruction set offers: register tiles and the small vector loops around them.
//
// The same source (tile.inl) is compiled once per instruction set with its own flags; the table of function
// pointers is chosen at run time. Files compiled with such flags include nothing but this header: an inline
// function of the standard library, emitted with AVX-512 in it, could otherwise be the copy the linker keeps.
#pragma once
#include <cstdint>

namespace afds {

constexpr int kMaxRows = 12;  // output channels in a register tile
constexpr int kMaxVecs = 8;   // vectors of pixels in a register tile
constexpr int kSumLanes = 4;  // pooled sums are kept as this many partial sums, whatever the vector's width
constexpr int kAhead = 8;     // steps; a pointwise tile asks for its pixels this early, so xoff is longer by it
enum Mode { kPlain, kFetchWeights, kFetchPixels, kFetchBoth, kModes };
constexpr int kRound = 16;    // floats; planes are cut to whole 64-byte lines for every instruction set

enum Act : int { kNone = 0, kRelu, kRelu6, kSilu, kHardswish, kSigmoid, kHardsigmoid };

// A pair is two bf16 numbers of two channels in one 32-bit word, the first in its lower half: how bf16 products read
// pixels and weights.
struct Half {
  uint32_t *words;  // pixel 0 of the pair's plane
  uint32_t keep;    // bits that a store leaves as they are: those of the other half, or none where that is to be zero
  int shift;        // 0: into the lower half, 16: into the upper one
};

// out[r][i] = act(scale[r] * sum_s w[r][woff[s]] * x[i + xoff[s]] + shift[r] + res[r][i]) & mask[i]
//
// In a product of pairs, x points to words in place of floats, and a step is a pair of input channels at a tap. So does
// w where PairTable::words; otherwise the weights of a pair are floats, w[r][woff[s]] and w[r][woff[s] + upper].
struct Tile {
  const float *x;            // the block's first pixel in channel 0
  const int32_t *xoff;       // [steps] floats from x: channel and tap
  const int32_t *woff;       // [steps] floats from the row's start
  int64_t upper;
  int32_t steps;
  const float *const *w;     // [rows]
  const float *scale;        // [rows]
  const float *shift;        // [rows]
  int64_t at;                // the block's first pixel, for out, res and mask
  float *const *out;         // [rows], pixel 0, or null
  const Half *half;          // [rows] or null: the same, rounded to bf16, as halves of pairs
  bool whole;                // rows 0 and 1, 2 and 3, ... are the two halves of a word each: rows is even
  const float *const *res;   // [rows] or null
  const Half *res_half;      // [rows] or null: the same in halves of pairs, for products of pairs
  const uint32_t *mask;      // all ones where a pixel is, zero on padding
  float *const *sum;         // [rows] of kSumLanes running sums of what is stored, or null
  const float *const *fetch; // [8] rows of weights that are read next, asked for ahead of time
  int act;
};

using TileFn = void (*)(const Tile &);

struct Table {
  const char *name;
  int lanes;
  int accumulators;                                // registers that a tile may fill with sums
  // Null where it would not fit the registers. By mode, which says what is asked for ahead of time.
  TileFn tile[kModes][kMaxRows + 1][kMaxVecs + 1];
  // h[0..n) += sum_i p[i] * rows[i][0..n)
  void (*axpy)(float *h, int n, const float *const *rows, const float *p, int m);
  void (*axpy_bf16)(float *h, int n, const uint16_t *const *rows, const float *p, int m);
  // how many of keys[0..n) are >= t
  int (*count_ge)(const int32_t *keys, int n, int32_t t);
  // keys[i] = bits of max(q[i] * importance[i], 0), with q[i] = min(max(h[i], 0), ceiling)
  void (*score)(int32_t *keys, float *q, const float *h, const float *importance, float ceiling, int n);
  // dst[y][x] = src[y][x * stride] for x < width, zero from there to the next row; writes up to kRound floats more
  void (*stage)(float *dst, int dst_pitch, const float *src, int src_pitch, int rows, int width, int stride);
  // dst[x] = max of three rows
  void (*max3)(float *dst, const float *a, const float *b, const float *c, int n);
  // dst[x] = max(dst[x], src[x * stride]);  dst[x] += src[x * stride]
  void (*stride_max)(float *dst, const float *src, int n, int stride);
  void (*stride_add)(float *dst, const float *src, int n, int stride);
  // out[i] = act(a[i] * scale + b[i]) & mask[i] for n pixels (a multiple of kRound); b may be null; sums as above
  void (*eltwise)(float *out, const float *a, float scale, const float *b, const uint32_t *mask, int n, int act,
                  float *sum);
  void (*activate)(float *v, int n, int act);      // in place, any n
  // n floats, rounded to bf16, into halves of pairs; any n
  void (*halve)(Half to, const float *from, int n);
  // Each half of dst[x] = the larger one of its own and that of src[x * stride], where none is negative; a NaN is the largest
  void (*max_words)(uint32_t *dst, const uint32_t *src, int n, int stride);
  // lower[], upper[] += sums of n words' halves; any n
  void (*sum_words)(float *lower, float *upper, const uint32_t *from, int n);
  // to[i] = (lower[i], upper[i]) rounded to bf16; upper may be null: zeros; any n. sums: [2][kSumLanes], += those of n floats
  void (*pair_rows)(uint32_t *to, const float *lower, const float *upper, int n, float *sums);
};

// Products of pairs, accumulated in float32. Any instruction set can do them by two multiply-adds on the halves; then
// weights are made floats first, a few rows at a time: each is read for many pixels.
struct PairTable {
  const char *name;
  bool words;  // the product reads weights as pairs
  // lower[i], upper[i] = the halves of from[i] as floats, i < n; writes up to kRound floats more, of each
  void (*widen)(float *lower, float *upper, const uint32_t *from, int n);
  TileFn tile[kModes][kMaxRows + 1][kMaxVecs + 1];
};

// A product on AMX's registers, each a matrix: 16 rows of weights times 16 pixels, up to 32 input channels at once.
constexpr int kAmxRows = 16, kAmxDepth = 16, kAmxVec = 16;  // rows; pairs of one block; pixels of one register

struct AmxJob {
  const uint16_t *a;    // weights, zero where a pair or a channel is not there
  int64_t a_row, a_block, a_tile;  // numbers from a row, a block, a row tile to the next
  int rows;             // of a row tile: even, at most kAmxRows
  int blocks, depth;    // of the sum; pairs of one block, at most kAmxDepth
  const uint32_t *b;    // words of the first pixel of all
  const int32_t *block; // [blocks] words from b to a block's first pair
  int64_t pair, vec;    // words from one pair, and from one vector of pixels, to the next
  int row_begin, row_end, vec_begin, vec_end;  // row tiles and vectors of this job
  int vec_first;        // the vector of pixels that lies at b
  int channels;         // rows in all: the last row tile may have fewer than `rows`
  const float *scale, *shift;  // [channels]
  float *const *out;           // [channels] pixel 0, or null
  uint32_t *const *words;      // [channels / 2, rounded up] pixel 0 of planes that two rows share, or null
  const Half *half;            // [channels] in place of it: halves of any planes, or null
  const float *const *res;     // [channels] or null
  const Half *res_half;        // [channels] or null
  const uint32_t *const *res_words;  // [channels / 2, rounded up] in place of it: planes of pairs where all are active
  const uint32_t *mask;
  float *const *sum;           // [channels] or null
  int act;
};

struct AmxTable {
  const char *name;
  // to[vec][step] = the kAmxVec words from `from + xoff[step] + vec * kAmxVec` on, zeros from `steps` to `padded`
  void (*panel)(uint32_t *to, const uint32_t *from, const int32_t *xoff, int steps, int padded, int vecs);
  // Of the calling thread, before products of such row tiles and blocks, and after them.
  void (*configure)(int rows, int depth);
  void (*product)(const AmxJob &);
  void (*release)();
};

extern const Table kTableBase;
extern const PairTable kPairsBase;
#if defined(__x86_64__) || defined(_M_X64)
extern const Table kTableAvx2;
extern const Table kTableAvx512;
extern const PairTable kPairsAvx2;
extern const PairTable kPairsAvx512;
extern const PairTable kPairsDot;  // vdpbf16ps
#if defined(AFDS_AMX)
extern const AmxTable kAmx;
bool request_amx();  // of the operating system, once for the process: whether its registers may be used
#endif
// Of from[0..n), those whose bit is set in `on`, one after the other into `to`; writes up to 31 numbers more.
void pick_vbmi2(uint16_t *to, const uint16_t *from, int n, const uint32_t *on);
#endif

}  // namespace afds
