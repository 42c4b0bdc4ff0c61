// A linear's weight in one of the formats that it is kept in, and the product with it. See kernels/matmul.py.
#pragma once

#include "kernels.h"

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

// Named like the operator called alone, so that a profile reads the same either way.
#define ML_PROFILED(name) RECORD_FUNCTION("manylora::" name, c10::ArrayRef<const c10::IValue>{})

namespace manylora {

struct Weight : torch::CustomClassHolder {
  // x [T, in_features] -> [T, out_features], with the bias. A format whose kernel can, asks for `soon` on the way.
  virtual at::Tensor multiply(const at::Tensor& x, const Soon& soon) const = 0;
};
using WeightPtr = c10::intrusive_ptr<Weight>;

// The class `Weight` with a static method for each format. Before the classes that are made of weights.
void register_weights(torch::Library& m);

}  // namespace manylora
