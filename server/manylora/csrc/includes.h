// Everything a CPU path includes, to stand before its target pragma: what is defined here stays baseline code.
#pragma once

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ML_HAS_TARGET_PRAGMA 1
#include <immintrin.h>
#if ML_EMULATE
#include "emulate.h"
#endif
#endif
