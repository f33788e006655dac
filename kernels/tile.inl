// Register tiles, written once for every vector width. Included by isa_*.cpp, which set AFDS_NAME, AFDS_LANES and
// AFDS_ACCUMULATORS and are compiled with the flags of their instruction set.
//
//   pixels are vector lanes, weights are broadcast scalars:
//
//        acc[r][v] += w[r][s] * x[s][v]        r: output channels   v: vectors of pixels   s: (input channel, tap)
//
// so that any set of output and of input channels costs the inner product nothing. In a product of pairs every word
// holds two input channels in bf16, and a step is both of them. AFDS_DOT: the file has an instruction for that, and
// gives these tiles only.
#include "vector.inl"

namespace afds {
namespace {

__attribute__((noinline)) void eltwise(float *out, const float *a, float scale, const float *b, const uint32_t *mask, int n, int act,
             float *sum) {
  const vf s = set1(scale);
  vf total = set1(0.0f);
  for (int i = 0; i < n; i += L) {
    vf v = load(a + i) * s;
    if (b) v += load(b + i);
    v = masked(apply(v, act), mask + i);
    store(out + i, v);
    total += v;
  }
  if (sum) add_sum(sum, total);
}

enum Kind { kFloats, kPairs };

// One step, of V vectors of pixels and R weights.
template <int R, int V, int KIND>
inline __attribute__((always_inline)) void product(vf (&acc)[R][V], const float *xs, const float *const (&w)[R], int64_t at,
                                                   int64_t upper) {
#ifdef AFDS_DOT
  static_assert(KIND == kPairs, "");
  (void)upper;
  vf in[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) in[v] = load(xs + v * L);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const vf b = set1(w[r][at]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)b, (__m512bh)in[v]);
  }
#else
  constexpr int kHalves = KIND == kPairs ? 2 : 1;
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
    if (KIND == kPairs) asm("" : "+r"(xs));  // words are read again: kept, they would cost sums their registers
    const auto pixels = [&](int v) {
      const vf p = load(xs + v * L);
      if (KIND != kPairs) return p;
      const vu b = reinterpret_cast<vu>(p);
      return reinterpret_cast<vf>(half ? b & 0xffff0000u : b << 16);
    };
    // Where all V vectors find no room beside the sums (2 x 6 and 3 x 4 of 16 registers), the R weights stay and the
    // vectors pass.
    if constexpr (R < V && R * V + V + 1 > kRegisters) {
      vf b[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) b[r] = set1(w[r][half ? at + upper : at]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        vf in = pixels(v);
#ifdef __AVX__
        asm("" : "+v"(in));  // else each product reads the pixels again
#endif
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r][v] += b[r] * in;
      }
    } else {
      vf in[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) in[v] = pixels(v);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf b = set1(w[r][half ? at + upper : at]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[r][v] += b * in[v];
      }
    }
  }
#endif
}

template <int R, int V, int MODE, int KIND>
void tile(const Tile &a) {
  vf acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = set1(0.0f);
  const float *w[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) w[r] = a.w[r];
  const float *x = a.x;
  const int32_t *xoff = a.xoff, *woff = a.woff;
  const float *const *fetch = a.fetch;
  constexpr bool kPixels = MODE == kFetchPixels || MODE == kFetchBoth, kWeights = MODE == kFetchWeights || MODE == kFetchBoth;
  if (kPixels && a.out) {  // what is written at the end, while the sums are made
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < V; v += 16 / L) __builtin_prefetch(a.out[r] + a.at + v * L, 1);
  }
  if (kPixels && KIND == kPairs && a.half) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r % 2 && a.whole) continue;
#pragma GCC unroll 16
      for (int v = 0; v < V; v += 16 / L) __builtin_prefetch(a.half[r].words + a.at + v * L, 1);
    }
  }
  for (int32_t s = 0, n = a.steps; s < n; ++s) {
    const float *xs = x + xoff[s];
    const int64_t at = woff[s];
    if (kWeights) __builtin_prefetch(fetch[s & 7] + at, 0, 2);
    if (MODE == kFetchBoth) __builtin_prefetch(fetch[(s + 4) & 7] + at, 0, 2);
    if (kPixels) {
      const float *ahead = x + xoff[s + kAhead];
#pragma GCC unroll 16
      for (int v = 0; v < V; v += 16 / L) __builtin_prefetch(ahead + v * L);
    }
    product<R, V, KIND>(acc, xs, w, at, a.upper);
  }
  const int act = a.act;
  const uint32_t *mask = a.mask + a.at;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const vf scale = set1(a.scale[r]), shift = set1(a.shift[r]);
    float *out = a.out ? a.out[r] + a.at : nullptr;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] * scale + shift;
    if (a.res) {
      const float *res = a.res[r] + a.at;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] += load(res + v * L);
    }
    if (KIND == kPairs && a.res_half) {
      const uint32_t *res = a.res_half[r].words + a.at;
      const int shift = 16 - a.res_half[r].shift;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] += half_of(res + v * L, shift);
    }
    if (act == kRelu) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = vmax(set1(0.0f), acc[r][v]);
    }
    if (act > kRelu) {  // the longer ones go through memory: here they would cost registers
      float line[V * L];
      if (!out) out = line;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store(out + v * L, acc[r][v]);
      eltwise(out, out, 1.0f, nullptr, mask, V * L, act, a.sum ? a.sum[r] : nullptr);
      if (a.half)
        for (int v = 0; v < V; ++v)
          store_half(a.half[r].words + a.at + v * L, load(out + v * L), a.half[r].keep, a.half[r].shift);
      continue;
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = masked(acc[r][v], mask + v * L);
    if (out) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store(out + v * L, acc[r][v]);
    }
    if (a.half && !a.whole) {
      uint32_t *words = a.half[r].words + a.at;
      const uint32_t keep = a.half[r].keep;
      const int shift = a.half[r].shift;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store_half(words + v * L, acc[r][v], keep, shift);
    }
    if (R % 2 == 0 && r % 2 && a.whole) {
      uint32_t *words = a.half[r].words + a.at;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store_pair(words + v * L, acc[r - r % 2][v], acc[r][v]);
    }
    if (a.sum) {
      vf total = acc[r][0];
#pragma GCC unroll 16
      for (int v = 1; v < V; ++v) total += acc[r][v];
      add_sum(a.sum[r], total);
    }
  }
}

// Twelve rows' pointers have no room in x86's general registers: on a Zen 3 a tile of 12 x 1 takes 14 cycles a step, two
// of 6 x 1 take 10. AVX-512 was not asked.
constexpr bool fits(int r, int v) { return r * v <= AFDS_ACCUMULATORS && !(L == 8 && r > 11); }

template <int R, int V, int MODE, int KIND>
constexpr TileFn entry() {
  if constexpr (R > 0 && V > 0 && fits(R, V)) return &tile<R, V, MODE, KIND>;
  else return nullptr;
}

#ifndef AFDS_DOT

void widen(float *lower, float *upper, const uint32_t *from, int n) {
  for (int i = 0; i < n; i += L) {
    const vu b = *reinterpret_cast<const vuu *>(from + i);
    store(lower + i, reinterpret_cast<vf>(b << 16));
    store(upper + i, reinterpret_cast<vf>(b & 0xffff0000u));
  }
}

// T: float, or uint16_t for bf16.
template <typename T>
void axpy(float *h, int n, const T *const *rows, const float *p, int m) {
  // Short rows are done before memory could answer: so many bytes have to be on their way.
  if (n < 1) return;
  constexpr int kFar = 12 << 10;
  const int group = 8 * n * int(sizeof(T)), ahead = 8 * (group < kFar ? kFar / group : 1);
  int i = 0;
  for (; i + 8 <= m; i += 8) {
    const T *w[8], *next[8];  // rows are short and scattered: what is read next has to be asked for
    vf s[8];
    for (int r = 0; r < 8; ++r) {
      w[r] = rows[i + r];
      next[r] = rows[i + ahead + r < m ? i + ahead + r : m - 1];
      s[r] = set1(p[i + r]);
    }
    int j = 0;
    for (; j + L <= n; j += L) {
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) __builtin_prefetch(next[r] + j, 0, 2);
      vf t0 = load(h + j) + s[0] * load(w[0] + j), t1 = s[1] * load(w[1] + j);
      t0 += s[2] * load(w[2] + j);
      t1 += s[3] * load(w[3] + j);
      t0 += s[4] * load(w[4] + j);
      t1 += s[5] * load(w[5] + j);
      t0 += s[6] * load(w[6] + j);
      t1 += s[7] * load(w[7] + j);
      store(h + j, t0 + t1);
    }
    for (; j < n; ++j) {
      float t = h[j];
      for (int r = 0; r < 8; ++r) t += p[i + r] * one(w[r][j]);
      h[j] = t;
    }
  }
  for (; i < m; ++i) {
    const T *w = rows[i];
    const float s = p[i];
    for (int j = 0; j < n; ++j) h[j] += s * one(w[j]);
  }
}

int count_ge(const int32_t *keys, int n, int32_t t) {
  int c = 0;
  for (int i = 0; i < n; ++i) c += keys[i] >= t;
  return c;
}

constexpr int32_t kInfinity = 0x7f800000;

void score(int32_t *keys, float *q, const float *h, const float *importance, float ceiling, int n) {
  const vf zero = set1(0.0f), top = set1(ceiling);
  int i = 0;
  for (; i + L <= n; i += L) {
    const vf v = vmin(top, vmax(zero, load(h + i)));
    store(q + i, v);
    const vi s = reinterpret_cast<vi>(vmax(zero, v * load(importance + i))) & 0x7fffffff;
    const vi beyond = s > kInfinity;  // a NaN wins, so that it is seen at the end
    *reinterpret_cast<viu *>(keys + i) = (s & ~beyond) | (beyond & kInfinity);
  }
  for (; i < n; ++i) {
    float v = h[i] <= 0 ? 0 : h[i];
    q[i] = v = v > ceiling ? ceiling : v;
    v *= importance[i];
    keys[i] = kInfinity;
    if (v == v) {
      v = v > 0 ? v : 0;
      __builtin_memcpy(keys + i, &v, sizeof v);
    }
  }
}

// The elements 0, 2, 4, ... of 2 L floats.
inline __attribute__((always_inline)) vf evens(const float *p) {
  const vf a = load(p), b = load(p + L);
#if AFDS_LANES == 16
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif AFDS_LANES == 8
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

void stage(float *dst, int dst_pitch, const float *src, int src_pitch, int rows, int width, int stride) {
  if (stride > 2) {
    for (int y = 0; y < rows; ++y, dst += dst_pitch, src += src_pitch) {
      for (int x = 0; x < width; ++x) dst[x] = src[x * stride];
      for (int x = width; x < dst_pitch; ++x) dst[x] = 0.0f;
    }
    return;
  }
  vi lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  const int whole = width / L * L;
  const vi keep = lane < width - whole;  // the last vector of a row: pixels, then zeros
  for (int y = 0; y < rows; ++y, dst += dst_pitch, src += src_pitch) {
    int x = 0;
    if (stride == 1) {
      for (; x < whole; x += L) store(dst + x, load(src + x));
      store(dst + x, reinterpret_cast<vf>(reinterpret_cast<vi>(load(src + x)) & keep));
    } else {
      for (; x < whole; x += L) store(dst + x, evens(src + 2 * x));
      store(dst + x, reinterpret_cast<vf>(reinterpret_cast<vi>(evens(src + 2 * x)) & keep));
    }
    for (x += L; x < dst_pitch; ++x) dst[x] = 0.0f;
  }
}

// The larger one, or a NaN where there is one.
inline __attribute__((always_inline)) vf larger(vf a, vf b) {
  const vi nan = a != a;
  return reinterpret_cast<vf>((reinterpret_cast<vi>(vmax(a, b)) & ~nan) | (reinterpret_cast<vi>(a) & nan));
}
inline float larger(float a, float b) { return a > b || a != a ? a : b; }

void max3(float *dst, const float *a, const float *b, const float *c, int n) {
  int i = 0;
  for (; i + L <= n; i += L) store(dst + i, larger(load(a + i), larger(load(b + i), load(c + i))));
  for (; i < n; ++i) dst[i] = larger(a[i], larger(b[i], c[i]));
}

template <int S>
void max_rows(float *__restrict dst, const float *__restrict src, int n) {
  for (int i = 0; i < n; ++i) dst[i] = larger(dst[i], src[S * i]);
}

void stride_max(float *dst, const float *src, int n, int stride) {
  if (stride == 1) max_rows<1>(dst, src, n);
  else if (stride == 2) max_rows<2>(dst, src, n);
  else
    for (int i = 0; i < n; ++i) dst[i] = larger(dst[i], src[stride * i]);
}

template <int S>
void add_rows(float *__restrict dst, const float *__restrict src, int n) {
  for (int i = 0; i < n; ++i) dst[i] += src[S * i];
}

void stride_add(float *dst, const float *src, int n, int stride) {
  if (stride == 1) add_rows<1>(dst, src, n);
  else if (stride == 2) add_rows<2>(dst, src, n);
  else
    for (int i = 0; i < n; ++i) dst[i] += src[stride * i];
}

void activate(float *v, int n, int act) {
  float part[L];
  for (int i = 0; i < n; i += L) {
    const int m = n - i < L ? n - i : L;
    for (int j = 0; j < m; ++j) part[j] = v[i + j];
    for (int j = m; j < L; ++j) part[j] = 0.0f;
    store(part, apply(load(part), act));
    for (int j = 0; j < m; ++j) v[i + j] = part[j];
  }
}

void halve(Half to, const float *from, int n) {
  int i = 0;
  for (; i + L <= n; i += L) store_half(to.words + i, load(from + i), to.keep, to.shift);
  for (; i < n; ++i) {
    uint32_t b;
    __builtin_memcpy(&b, from + i, sizeof b);
    b = from[i] == from[i] ? (b + 0x7fffu + ((b >> 16) & 1u)) >> 16 : 0x7fc0u;
    to.words[i] = b << to.shift | (to.words[i] & to.keep);
  }
}

// Bits of numbers that are not negative are ordered as they are. The sign goes: a zero or a NaN may have one.
inline __attribute__((always_inline)) vu larger_halves(vu a, vu b) {
  typedef int16_t vs __attribute__((vector_size(L * 4)));
  const vs x = reinterpret_cast<vs>(a & 0x7fff7fffu), y = reinterpret_cast<vs>(b & 0x7fff7fffu);
#if AFDS_LANES == 16
  return (vu)_mm512_max_epi16((__m512i)x, (__m512i)y);
#else
  const vs first = x > y;
  return reinterpret_cast<vu>((first & x) | (~first & y));
#endif
}

void max_words(uint32_t *dst, const uint32_t *src, int n, int stride) {
  int i = 0;
  if (stride <= 2 && n >= L)
    for (; i < n; i += L) {
      if (i > n - L) i = n - L;  // some of them twice: it changes nothing
      const float *from = reinterpret_cast<const float *>(src + i * stride);
      vuu &to = *reinterpret_cast<vuu *>(dst + i);
      to = larger_halves(to, reinterpret_cast<vu>(stride == 1 ? load(from) : evens(from)));
    }
  for (; i < n; ++i) {
    const uint32_t a = dst[i] & 0x7fff7fffu, b = src[i * stride] & 0x7fff7fffu;
    const uint32_t lower = (a & 0xffffu) > (b & 0xffffu) ? a : b, upper = (a >> 16) > (b >> 16) ? a : b;
    dst[i] = (lower & 0xffffu) | (upper & 0xffff0000u);
  }
}

void sum_words(float *lower, float *upper, const uint32_t *from, int n) {
  vf low = set1(0.0f), up = set1(0.0f);
  int i = 0;
  for (; i + L <= n; i += L) {
    low += half_of(from + i, 16);
    up += half_of(from + i, 0);
  }
  for (; i < n; ++i) {
    lower[0] += one(uint16_t(from[i]));
    upper[0] += one(uint16_t(from[i] >> 16));
  }
  add_sum(lower, low);
  add_sum(upper, up);
}

void pair_rows(uint32_t *to, const float *lower, const float *upper, int n, float *sums) {
  vf low = set1(0.0f), up = set1(0.0f);
  int i = 0;
  for (; i + L <= n; i += L) {
    const vf a = load(lower + i), b = upper ? load(upper + i) : set1(0.0f);
    store_pair(to + i, a, b);
    low += a;
    up += b;
  }
  if (i < n) {  // the rest, with zeros behind it
    float a[L] = {}, b[L] = {};
    uint32_t pairs[L];
    for (int j = 0; j < n - i; ++j) a[j] = lower[i + j], b[j] = upper ? upper[i + j] : 0.0f;
    store_pair(pairs, load(a), load(b));
    for (int j = 0; j < n - i; ++j) to[i + j] = pairs[j];
    low += load(a);
    up += load(b);
  }
  add_sum(sums, low);
  add_sum(sums + kSumLanes, up);
}

#endif  // AFDS_DOT

}  // namespace

#define AFDS_ROW(R, P, K)                                                                                       \
  {                                                                                                             \
    nullptr, entry<R, 1, P, K>(), entry<R, 2, P, K>(), entry<R, 3, P, K>(), entry<R, 4, P, K>(),                \
        entry<R, 5, P, K>(), entry<R, 6, P, K>(), entry<R, 7, P, K>(), entry<R, 8, P, K>()                      \
  }
#define AFDS_ROWS(P, K)                                                                                         \
  {                                                                                                             \
    {}, AFDS_ROW(1, P, K), AFDS_ROW(2, P, K), AFDS_ROW(3, P, K), AFDS_ROW(4, P, K), AFDS_ROW(5, P, K),          \
        AFDS_ROW(6, P, K), AFDS_ROW(7, P, K), AFDS_ROW(8, P, K), AFDS_ROW(9, P, K), AFDS_ROW(10, P, K),         \
        AFDS_ROW(11, P, K), AFDS_ROW(12, P, K)                                                                  \
  }
#define AFDS_MODES(K) {AFDS_ROWS(0, K), AFDS_ROWS(1, K), AFDS_ROWS(2, K), AFDS_ROWS(3, K)}

#ifdef AFDS_DOT
extern const PairTable AFDS_PAIRS = {AFDS_NAME, true, nullptr, AFDS_MODES(kPairs)};
#else
extern const PairTable AFDS_PAIRS = {AFDS_NAME, false, widen, AFDS_MODES(kPairs)};
extern const Table AFDS_TABLE = {AFDS_NAME,  L,          AFDS_ACCUMULATORS, AFDS_MODES(kFloats),
                                 axpy<float>, axpy<uint16_t>, count_ge, score, stage, max3,
                                 stride_max, stride_add, eltwise,           activate, halve,    max_words, sum_words, pair_rows};
#endif

}  // namespace afds
