#include "includes.h"

#if ML_HAS_TARGET_PRAGMA
#if ML_EMULATE
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#endif
#define ML_HAS_AVX2 1
#define ML_HAS_AVX512 1
#define ML_HAS_VNNI 1
#define ML_PATH_FUNCTION avx512_kernels
#define ML_PATH_NAME "avx512"
#include "path.h"
#else
const manylora::Kernels* manylora::avx512_kernels() { return nullptr; }
#endif
