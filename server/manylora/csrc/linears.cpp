// The base's linears as C++ functions of tensors, their arguments checked. See operators.h.

#include "checks.h"
#include "kernels.h"
#include "operators.h"

#include <ATen/ops/empty.h>

namespace manylora {

using at::Tensor;

namespace {

// One float32 for each output, or null.
const float* bias_of(const std::optional<Tensor>& bias, int64_t out_features) {
  if (!bias) return nullptr;
  check(*bias, "bias", 1, at::kFloat);
  TORCH_CHECK_VALUE(bias->numel() == out_features, "bias must have one entry per output");
  return bias->const_data_ptr<float>();
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& packed, int64_t out_features, const std::optional<Tensor>& bias,
              const Soon& soon) {
  check(x, "x", 2, x.scalar_type());
  check(packed, "packed", 4, x.scalar_type());
  TORCH_CHECK_VALUE(out_features >= 0, "out_features must not be negative");
  int64_t in_features = x.size(1), depth = x.scalar_type() == at::kBFloat16 ? kBf16Depth : 1;
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.size(0) == (out_features + kPanelWidth - 1) / kPanelWidth &&
                        packed.size(1) == (in_features + depth - 1) / depth && packed.size(2) == kPanelWidth &&
                        packed.size(3) == depth,
                    "packed does not fit x and out_features");
  const float* added = bias_of(bias, out_features);
  Tensor out = at::empty({x.size(0), out_features}, x.options()), inputs;
  LinearArgs args{};
  args.dtype = dtype_of(x);
  if (args.dtype != DType::f32) inputs = at::empty({x.size(0), packed.size(1) * depth}, x.options().dtype(at::kFloat));
  args.out = {out.data_ptr(), out.stride(0)};
  args.x = {x.const_data_ptr(), x.stride(0)};
  args.packed = packed.const_data_ptr();
  args.bias = added;
  args.inputs = inputs.defined() ? inputs.data_ptr() : nullptr;
  args.num_rows = x.size(0);
  args.in_features = in_features;
  args.out_features = out_features;
  args.soon = soon;
  kernels().linear(args);
  return out;
}

Tensor int8_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& group_sums,
                   const std::optional<Tensor>& bias, int64_t group_size, const Soon& soon) {
  check(x, "x", 2, x.scalar_type());
  check(packed, "packed", 4, at::kChar);
  check(scales, "scales", 1, at::kFloat);
  check(group_sums, "group_sums", 2, at::kInt);
  int64_t in_features = x.size(1), out_features = scales.numel();
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.size(0) == (out_features + kPanelWidth - 1) / kPanelWidth &&
                        packed.size(1) == (in_features + kInt8Depth - 1) / kInt8Depth &&
                        packed.size(2) == kPanelWidth && packed.size(3) == kInt8Depth,
                    "packed does not fit x and scales");
  TORCH_CHECK_VALUE(group_size > 0 && group_size % kInt8Depth == 0, "group_size must be a multiple of ", kInt8Depth);
  int64_t num_groups = (in_features + group_size - 1) / group_size;
  TORCH_CHECK_VALUE(group_sums.is_contiguous() && group_sums.size(0) == num_groups &&
                        group_sums.size(1) == packed.size(0) * kPanelWidth,
                    "group_sums does not fit packed and group_size");
  const float* added = bias_of(bias, out_features);
  Tensor out = at::empty({x.size(0), out_features}, x.options());
  Tensor quantised = at::empty({x.size(0), packed.size(1) * kInt8Depth}, x.options().dtype(at::kShort));
  Tensor row_scales = at::empty({x.size(0), num_groups}, scales.options());
  Int8LinearArgs args{};
  args.dtype = dtype_of(x);
  args.out = {out.data_ptr(), out.stride(0)};
  args.x = {x.const_data_ptr(), x.stride(0)};
  args.packed = packed.const_data_ptr<int8_t>();
  args.scales = scales.const_data_ptr<float>();
  args.group_sums = group_sums.const_data_ptr<int32_t>();
  args.bias = added;
  args.quantised = quantised.data_ptr();
  args.row_scales = row_scales.data_ptr<float>();
  args.num_rows = x.size(0);
  args.in_features = in_features;
  args.out_features = out_features;
  args.group_size = group_size;
  args.soon = soon;
  kernels().int8_linear(args);
  return out;
}

Tensor int4_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t out_features,
                   const std::optional<Tensor>& bias, int64_t group_size, const Soon& soon) {
  check(x, "x", 2, x.scalar_type());
  check(packed, "packed", 4, at::kByte);
  check(scales, "scales", 4, at::kHalf);
  TORCH_CHECK_VALUE(out_features >= 0, "out_features must not be negative");
  int64_t in_features = x.size(1), num_panels = (out_features + kPanelWidth - 1) / kPanelWidth;
  int64_t num_steps = (in_features + kInt4Depth - 1) / kInt4Depth;
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.size(0) == num_panels && packed.size(1) == num_steps &&
                        packed.size(2) == kPanelWidth && packed.size(3) == kInt4Depth / 2,
                    "packed does not fit x and out_features");
  TORCH_CHECK_VALUE(group_size > 0 && group_size % kInt4Block == 0, "group_size must be a multiple of ", kInt4Block);
  int64_t num_groups = in_features / group_size + (in_features % group_size != 0);
  TORCH_CHECK_VALUE(scales.is_contiguous() && scales.size(0) == num_panels && scales.size(1) == num_groups &&
                        (scales.size(2) == 1 || scales.size(2) == 2) && scales.size(3) == kPanelWidth,
                    "scales do not fit packed and group_size");
  const float* added = bias_of(bias, out_features);
  int64_t num_blocks = (in_features + kInt4Block - 1) / kInt4Block;
  Tensor out = at::empty({x.size(0), out_features}, x.options());
  Tensor quantised = at::empty({x.size(0), num_steps * kInt4Depth}, x.options().dtype(at::kChar));
  Tensor row_scales = at::empty({x.size(0), num_blocks, 2}, x.options().dtype(at::kFloat));
  Int4LinearArgs args{};
  args.dtype = dtype_of(x);
  args.out = {out.data_ptr(), out.stride(0)};
  args.x = {x.const_data_ptr(), x.stride(0)};
  args.packed = packed.const_data_ptr<uint8_t>();
  args.scales = static_cast<const uint16_t*>(scales.const_data_ptr());
  args.has_offsets = scales.size(2) == 2;
  args.bias = added;
  args.quantised = quantised.data_ptr<int8_t>();
  args.row_scales = row_scales.data_ptr<float>();
  args.num_rows = x.size(0);
  args.in_features = in_features;
  args.out_features = out_features;
  args.group_size = group_size;
  args.soon = soon;
  kernels().int4_linear(args);
  return out;
}

}  // namespace manylora
