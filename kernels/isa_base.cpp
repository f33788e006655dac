// The portable path: four lanes through GCC/Clang vector extensions, which is SSE2 on x86-64 and NEON on ARM.
#define AFDS_TABLE kTableBase
#define AFDS_PAIRS kPairsBase
#define AFDS_LANES 4
#if defined(__aarch64__)
#define AFDS_NAME "neon"
#define AFDS_ACCUMULATORS 24
#else
#define AFDS_NAME "portable"
#define AFDS_ACCUMULATORS 12
#endif
#include "tile.inl"
