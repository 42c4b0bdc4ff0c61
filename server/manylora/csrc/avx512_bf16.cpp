#include "includes.h"

#if ML_HAS_TARGET_PRAGMA
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c")
#define ML_PATH_FUNCTION avx512_bf16_kernels
#define ML_PATH_NAME "avx512_bf16"
#include "path.h"
#else
const manylora::Kernels* manylora::avx512_bf16_kernels() { return nullptr; }
#endif
