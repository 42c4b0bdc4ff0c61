#include "includes.h"

#if ML_HAS_TARGET_PRAGMA
#if ML_EMULATE
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define ML_HAS_AVX2 1
#define ML_HAS_VNNI 1
#define ML_PATH_FUNCTION avx2_vnni_kernels
#define ML_PATH_NAME "avx2_vnni"
#include "path.h"
#else
const manylora::Kernels* manylora::avx2_vnni_kernels() { return nullptr; }
#endif
