// Vectors of AFDS_LANES floats, and what every kernel file does with them. AFDS_DOT: the file has bf16 instructions.
#include "table.h"

#if AFDS_LANES == 16
#include <immintrin.h>
#elif AFDS_LANES == 8
#include <immintrin.h>
#endif

namespace afds {
namespace {

constexpr int L = AFDS_LANES;
#if AFDS_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
typedef float vf __attribute__((vector_size(L * 4)));
typedef float vfu __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(L * 4)));
typedef int32_t viu __attribute__((vector_size(L * 4), aligned(4), may_alias));

inline __attribute__((always_inline)) vf load(const float *p) { return *reinterpret_cast<const vfu *>(p); }
inline __attribute__((always_inline)) void store(float *p, vf v) { *reinterpret_cast<vfu *>(p) = v; }
// A bf16 number is the upper half of a float32.
typedef uint16_t hu __attribute__((vector_size(L * 2), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(L * 4)));
inline __attribute__((always_inline)) vf load(const uint16_t *p) {
  return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const hu *>(p), vu) << 16);
}
inline float one(float w) { return w; }
inline float one(uint16_t w) {
  const uint32_t bits = uint32_t(w) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
inline __attribute__((always_inline)) vf masked(vf v, const uint32_t *m) {
  return reinterpret_cast<vf>(reinterpret_cast<vi>(v) & *reinterpret_cast<const viu *>(m));
}

#if AFDS_LANES == 16
inline __attribute__((always_inline)) vf set1(float w) { return _mm512_set1_ps(w); }
inline __attribute__((always_inline)) vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
inline __attribute__((always_inline)) vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
#elif AFDS_LANES == 8
inline __attribute__((always_inline)) vf set1(float w) { return _mm256_set1_ps(w); }
inline __attribute__((always_inline)) vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline __attribute__((always_inline)) vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
#else
inline __attribute__((always_inline)) vf set1(float w) { return vf{w, w, w, w}; }
inline __attribute__((always_inline)) vf pick(vi m, vf a, vf b) {
  return reinterpret_cast<vf>((m & reinterpret_cast<vi>(a)) | (~m & reinterpret_cast<vi>(b)));
}
inline __attribute__((always_inline)) vf vmax(vf a, vf b) { return pick(a > b, a, b); }
inline __attribute__((always_inline)) vf vmin(vf a, vf b) { return pick(a < b, a, b); }
#endif

// exp to about 1e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients).
inline __attribute__((always_inline)) vf vexp(vf x) {
  x = vmin(set1(88.0f), vmax(set1(-87.0f), x));  // in this order a NaN stays one
  vf t = x * set1(1.44269504088896341f);
  const vi sign = reinterpret_cast<vi>(t) & reinterpret_cast<vi>(set1(-0.0f));
  const vf half = reinterpret_cast<vf>(sign | reinterpret_cast<vi>(set1(0.5f)));
  vi n = __builtin_convertvector(t + half, vi);
  vf f = __builtin_convertvector(n, vf);
  vf r = x - f * set1(0.693359375f) - f * set1(-2.12194440e-4f);
  vf p = set1(1.9875691500e-4f);
  p = p * r + set1(1.3981999507e-3f);
  p = p * r + set1(8.3334519073e-3f);
  p = p * r + set1(4.1665795894e-2f);
  p = p * r + set1(1.6666665459e-1f);
  p = p * r + set1(5.0000001201e-1f);
  p = p * r * r + r + set1(1.0f);
  return p * reinterpret_cast<vf>((n + 127) << 23);
}

// max(0, v) in this order keeps a NaN a NaN, as torch does.
inline __attribute__((always_inline)) vf apply(vf v, int act) {
  const vf zero = set1(0.0f), one = set1(1.0f), six = set1(6.0f);
  switch (act) {
    case kRelu: return vmax(zero, v);
    case kRelu6: return vmin(six, vmax(zero, v));
    case kSilu: return v / (one + vexp(-v));
    case kHardswish: return v * vmin(six, vmax(zero, v + set1(3.0f))) * set1(1.0f / 6.0f);
    case kSigmoid: return one / (one + vexp(-v));
    case kHardsigmoid: return vmin(six, vmax(zero, v + set1(3.0f))) * set1(1.0f / 6.0f);
    default: return v;
  }
}

// Adds v to kSumLanes partial sums.
inline __attribute__((always_inline)) void add_sum(float *sum, vf v) {
#if AFDS_LANES == 16
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  const __m128 part = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(sum, _mm_add_ps(_mm_loadu_ps(sum), part));
#elif AFDS_LANES == 8
  const __m128 part = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  _mm_storeu_ps(sum, _mm_add_ps(_mm_loadu_ps(sum), part));
#else
  store(sum, load(sum) + v);
#endif
}

// Float32 to the nearest bf16 (ties to even), in the lower half. A NaN stays one.
inline __attribute__((always_inline)) vu nearest(vf v) {
#ifdef AFDS_DOT
  return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));  // a denormal becomes zero
#else
  const vu b = reinterpret_cast<vu>(v), nan = reinterpret_cast<vu>(v != v);
  return (((b + 0x7fffu + ((b >> 16) & 1u)) >> 16) & ~nan) | (nan & 0x7fc0u);
#endif
}

typedef uint32_t vuu __attribute__((vector_size(L * 4), aligned(4), may_alias));

inline __attribute__((always_inline)) void store_half(uint32_t *to, vf v, uint32_t keep, int shift) {
  *reinterpret_cast<vuu *>(to) = (nearest(v) << shift) | (*reinterpret_cast<const vuu *>(to) & keep);
}

// One half of each word; shift: 16 for the lower one, 0 for the upper one.
inline __attribute__((always_inline)) vf half_of(const uint32_t *from, int shift) {
  return reinterpret_cast<vf>((*reinterpret_cast<const vuu *>(from) << shift) & 0xffff0000u);
}

// Both halves of a word at once: nothing has to be read.
inline __attribute__((always_inline)) void store_pair(uint32_t *to, vf lower, vf upper) {
#ifdef AFDS_DOT
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                       20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  *reinterpret_cast<vuu *>(to) =
      (vu)_mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower));
#else
  *reinterpret_cast<vuu *>(to) = nearest(lower) | (nearest(upper) << 16);
#endif
}

}  // namespace
}  // namespace afds
