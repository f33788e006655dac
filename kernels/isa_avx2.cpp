#define AFDS_TABLE kTableAvx2
#define AFDS_PAIRS kPairsAvx2
#define AFDS_NAME "avx2"
#define AFDS_LANES 8
#define AFDS_ACCUMULATORS 12
#include "tile.inl"
