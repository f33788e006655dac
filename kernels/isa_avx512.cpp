#define AFDS_TABLE kTableAvx512
#define AFDS_PAIRS kPairsAvx512
#define AFDS_NAME "avx512"
#define AFDS_LANES 16
#define AFDS_ACCUMULATORS 25
#include "tile.inl"
