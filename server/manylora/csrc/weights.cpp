#include "weights.h"

#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string_view>
#include <utility>

namespace manylora {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Panels of `linear`.
struct PanelWeight final : Weight {
  PanelWeight(Tensor packed, int64_t out_features, MaybeTensor bias)
      : packed(std::move(packed)), out_features(out_features), bias(std::move(bias)) {}

  Tensor multiply(const Tensor& x, const Soon& soon) const override {
    ML_PROFILED("linear");
    return linear(x, packed, out_features, bias, soon);
  }

  Tensor packed;
  int64_t out_features;
  MaybeTensor bias;
};

// Panels of `int8_linear`.
struct Int8Weight final : Weight {
  Int8Weight(Tensor packed, Tensor scales, Tensor group_sums, int64_t group_size, MaybeTensor bias)
      : packed(std::move(packed)), scales(std::move(scales)), group_sums(std::move(group_sums)), group_size(group_size),
        bias(std::move(bias)) {}

  Tensor multiply(const Tensor& x, const Soon& soon) const override {
    ML_PROFILED("int8_linear");
    return int8_linear(x, packed, scales, group_sums, bias, group_size, soon);
  }

  Tensor packed, scales, group_sums;
  int64_t group_size;
  MaybeTensor bias;
};

// Panels of `int4_linear`.
struct Int4Weight final : Weight {
  Int4Weight(Tensor packed, Tensor scales, int64_t out_features, int64_t group_size, MaybeTensor bias)
      : packed(std::move(packed)), scales(std::move(scales)), out_features(out_features), group_size(group_size),
        bias(std::move(bias)) {}

  Tensor multiply(const Tensor& x, const Soon& soon) const override {
    ML_PROFILED("int4_linear");
    return int4_linear(x, packed, scales, out_features, bias, group_size, soon);
  }

  Tensor packed, scales;
  int64_t out_features, group_size;
  MaybeTensor bias;
};

// In oneDNN's own order.
struct OneDnnWeight final : Weight {
  OneDnnWeight(Tensor ordered, MaybeTensor bias) : ordered(std::move(ordered)), bias(std::move(bias)) {
    TORCH_CHECK_VALUE(this->ordered.is_mkldnn(), "ordered must be a weight in oneDNN's order");
  }

  Tensor multiply(const Tensor& x, const Soon&) const override {
    using Schema = Tensor(const Tensor&, const Tensor&, const MaybeTensor&, std::string_view,
                          c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
    static const auto pointwise =
        c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Schema>();
    return pointwise.call(x, ordered, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
  }

  Tensor ordered;
  MaybeTensor bias;
};

WeightPtr panels(Tensor packed, int64_t out_features, MaybeTensor bias) {
  return c10::make_intrusive<PanelWeight>(std::move(packed), out_features, std::move(bias));
}

WeightPtr int8(Tensor packed, Tensor scales, Tensor group_sums, int64_t group_size, MaybeTensor bias) {
  return c10::make_intrusive<Int8Weight>(std::move(packed), std::move(scales), std::move(group_sums), group_size,
                                         std::move(bias));
}

WeightPtr int4(Tensor packed, Tensor scales, int64_t out_features, int64_t group_size, MaybeTensor bias) {
  return c10::make_intrusive<Int4Weight>(std::move(packed), std::move(scales), out_features, group_size,
                                         std::move(bias));
}

WeightPtr onednn(Tensor ordered, MaybeTensor bias) {
  return c10::make_intrusive<OneDnnWeight>(std::move(ordered), std::move(bias));
}

}  // namespace

void register_weights(torch::Library& m) {
  m.class_<Weight>("Weight")
      .def_static("panels", panels)
      .def_static("int8", int8)
      .def_static("int4", int4)
      .def_static("onednn", onednn);
}

}  // namespace manylora
