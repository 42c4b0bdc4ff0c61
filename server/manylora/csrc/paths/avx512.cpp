#define ML_PATH ML_AVX512
#define ML_PATH_FUNCTION avx512_kernels
#define ML_PATH_NAME "avx512"
#include "path.h"
