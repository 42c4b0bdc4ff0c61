// Which CPU a file is compiled for, and all that it takes from outside. Every header of this folder begins with this
// one and can be opened alone: as it is for any CPU, with -DML_PATH=ML_AVX512 (or another of these) for that path.
#pragma once

#define ML_PORTABLE 0
#define ML_AVX2 1
#define ML_AVX2_VNNI 2
#define ML_AVX512 3
#define ML_AVX512_BF16 4
#ifndef ML_PATH
#define ML_PATH ML_PORTABLE
#endif
// A bit for each path that is built to run without its own instructions.
#ifndef ML_EMULATED
#define ML_EMULATED 0
#endif
#define ML_EMULATE ((ML_EMULATED >> ML_PATH) & 1)

// Standard headers stand here and nowhere else, before the target: their inline functions are shared with other files,
// where they have to stay baseline code.
#include "../kernels.h"

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
#else
#define ML_HAS_TARGET_PRAGMA 0
#endif

// What the path's code may use. The compiler's own macros do not follow the pragma.
#define ML_HAS_AVX2 (ML_HAS_TARGET_PRAGMA && ML_PATH >= ML_AVX2)
#define ML_HAS_VNNI (ML_HAS_TARGET_PRAGMA && ML_PATH >= ML_AVX2_VNNI)
#define ML_HAS_AVX512 (ML_HAS_TARGET_PRAGMA && ML_PATH >= ML_AVX512)
#define ML_HAS_AVX512_BF16 (ML_HAS_TARGET_PRAGMA && ML_PATH >= ML_AVX512_BF16)

#if ML_HAS_AVX2
#if ML_EMULATE || ML_PATH == ML_AVX2
#pragma GCC target("avx2,fma,f16c")
#elif ML_PATH == ML_AVX2_VNNI
#pragma GCC target("avx2,fma,f16c,avxvnni")
#elif ML_PATH == ML_AVX512
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c")
#endif
#endif
