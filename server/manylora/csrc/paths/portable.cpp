#define ML_PATH ML_PORTABLE
#define ML_PATH_FUNCTION portable_kernels
#define ML_PATH_NAME "portable"
#include "path.h"
