// One CPU path: the same sources, compiled once per instruction set into an unnamed namespace. The including file has
// defined ML_PATH, ML_PATH_FUNCTION and ML_PATH_NAME; see avx2.cpp for an example.
#pragma once

#include "target.h"

#if ML_PATH == ML_PORTABLE || ML_HAS_TARGET_PRAGMA

#include "attention.h"
#include "cache.h"
#include "elementwise.h"
#include "int4.h"
#include "int8.h"
#include "linear.h"
#include "lora.h"
#include "mix.h"
#include "output.h"

#ifdef ML_PATH_FUNCTION
const manylora::Kernels* manylora::ML_PATH_FUNCTION() {
  static constexpr Kernels table = {ML_PATH_NAME,    add_lora, change_output, add_mixes,
                                    paged_attention, write_kv, rms_norm,      gated_activation,
                                    rope_write_kv,   linear,   int8_linear,   int4_linear};
  return &table;
}
#endif

#else

const manylora::Kernels* manylora::ML_PATH_FUNCTION() { return nullptr; }

#endif
