#define AFDS_PAIRS kPairsDot
#define AFDS_NAME "avx512_bf16"
#define AFDS_LANES 16
#define AFDS_ACCUMULATORS 25
#define AFDS_DOT
#include "tile.inl"
