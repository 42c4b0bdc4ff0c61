#define ML_PATH ML_AVX512_BF16
#define ML_PATH_FUNCTION avx512_bf16_kernels
#define ML_PATH_NAME "avx512_bf16"
#include "path.h"
