// What the operators check of every tensor that they are given.
#pragma once

#include "kernels.h"

#include <ATen/core/Tensor.h>

namespace manylora {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK_TYPE(false, "expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

inline void check(const at::Tensor& tensor, const char* name, int64_t dim, at::ScalarType type) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, is on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, " must have ", dim, " dimensions, has ", tensor.dim());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", is ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.size(-1) == 1 || tensor.stride(-1) == 1, name,
                    " must be contiguous in its last dimension");
}

}  // namespace manylora
