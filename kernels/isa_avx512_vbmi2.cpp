#include <immintrin.h>

#include "table.h"

namespace afds {

void pick_vbmi2(uint16_t *to, const uint16_t *from, int n, const uint32_t *on) {
  for (int i = 0; i < n; i += 32) {
    const uint32_t take = on[i / 32];
    const uint32_t there = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(take, _mm512_maskz_loadu_epi16(there, from + i)));
    to += __builtin_popcount(take);
  }
}

}  // namespace afds
