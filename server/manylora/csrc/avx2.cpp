#include "includes.h"

#if ML_HAS_TARGET_PRAGMA
#pragma GCC target("avx2,fma,f16c")
#define ML_HAS_AVX2 1
#define ML_PATH_FUNCTION avx2_kernels
#define ML_PATH_NAME "avx2"
#include "path.h"
#else
const manylora::Kernels* manylora::avx2_kernels() { return nullptr; }
#endif
