#define ML_PATH ML_AVX2_VNNI
#define ML_PATH_FUNCTION avx2_vnni_kernels
#define ML_PATH_NAME "avx2_vnni"
#include "path.h"
