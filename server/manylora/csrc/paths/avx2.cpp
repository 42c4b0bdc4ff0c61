#define ML_PATH ML_AVX2
#define ML_PATH_FUNCTION avx2_kernels
#define ML_PATH_NAME "avx2"
#include "path.h"
