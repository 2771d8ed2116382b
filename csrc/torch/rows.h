// What the row losses' registrations share: from logits to RowPair, and the outputs of forward and backward.
#pragma once

#include "tensors.h"

#include "../arguments.h"

namespace kdkernels {

inline RowPair row_pair(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight) {
  check_same_sizes(student, teacher);
  RowPair pair{};
  pair.student = row_view(student);
  pair.teacher = row_view(teacher);
  pair.rows = row_count(student);
  pair.columns = student.size(student.dim() - 1);
  pair.wide = is_wide(student);
  STD_TORCH_CHECK(pair.columns > 0, "no classes");
  if (weight.has_value()) {
    STD_TORCH_CHECK(
        weight->is_contiguous() && weight->scalar_type() == arithmetic_dtype(pair.wide) && weight->numel() == pair.rows,
        "weight: expected a contiguous value per row, in the dtype of the arithmetic");
    pair.weight = weight->data_ptr();
  }
  return pair;
}

inline RowReduction row_reduction(int64_t kind, std::optional<double> average, const std::optional<Tensor>& tensor) {
  return RowReduction{enumerator("reduction", kind, 4), average.has_value() || tensor.has_value(),
                      device_scalar(average.value_or(0), tensor)};
}

// 0-d, or one value per row.
inline Tensor new_loss(const Tensor& student, bool wide, int64_t reduction) {
  return new_buffer(student, reduction == RowReduction::none ? row_shape(student) : std::vector<int64_t>{},
                    arithmetic_dtype(wide));
}

inline Tensor new_statistics(const Tensor& student, const RowPair& pair, int64_t per_row) {
  return new_buffer(student, {pair.rows, per_row}, arithmetic_dtype(pair.wide));
}

inline void check_backward(const RowPair& pair, const Tensor& grad_loss, bool per_row, const Tensor& statistics,
                           int64_t statistics_per_row) {
  const ScalarType dtype = arithmetic_dtype(pair.wide);
  STD_TORCH_CHECK(
      grad_loss.scalar_type() == dtype && grad_loss.is_contiguous() && grad_loss.numel() == (per_row ? pair.rows : 1),
      "grad_loss does not belong to this loss");
  STD_TORCH_CHECK(statistics.scalar_type() == dtype && statistics.is_contiguous() &&
                      statistics.numel() == pair.rows * statistics_per_row,
                  "statistics do not belong to this loss");
}

// The gradient's tensor, with its view put into the pair.
inline Tensor row_gradient(const Tensor& student, RowPair& pair) {
  Tensor grad = new_gradient(student);
  pair.grad = row_view(grad);
  return grad;
}

// What a one-pass op is given, but for the options of its loss.
struct RowCall {
  Tensor student;
  RowPair pair;
  DeviceScalar loss_weight;
};
inline RowCall row_call(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                        int64_t reduction, double loss_weight, const std::optional<Tensor>& loss_weight_tensor) {
  const RowCall call{student, row_pair(student, teacher, weight), device_scalar(loss_weight, loss_weight_tensor)};
  STD_TORCH_CHECK(!call.pair.wide, "float64 has no one-pass kernel");
  STD_TORCH_CHECK(reduction != RowReduction::none, "one value per row has no one-pass kernel");
  return call;
}

// What it returns: the loss, and the gradient that `new_grad(student)` allocates and call.pair.grad then shows.
struct RowPass {
  Tensor loss, grad;
};
template <class F>
RowPass row_pass(RowCall& call, const F& new_grad) {
  RowPass pass{new_buffer(call.student, {}, ScalarType::Float), new_grad(call.student)};
  call.pair.grad = row_view(pass.grad);
  return pass;
}

// temperature_kl_one_pass, and binary_kl_one_pass.
struct TemperatureCall : RowCall {
  double temperature;
  RowReduction reduction;
};
inline TemperatureCall temperature_call(Tensor student, Tensor teacher, double temperature,
                                        std::optional<Tensor> weight, int64_t reduction,
                                        std::optional<double> avg_factor, std::optional<Tensor> avg_factor_tensor,
                                        double loss_weight, std::optional<Tensor> loss_weight_tensor) {
  return {row_call(student, teacher, weight, reduction, loss_weight, loss_weight_tensor), temperature,
          row_reduction(reduction, avg_factor, avg_factor_tensor)};
}

inline const int64_t* label_data(const std::optional<Tensor>& target, int64_t rows) {
  if (!target.has_value()) return nullptr;
  STD_TORCH_CHECK(target->scalar_type() == ScalarType::Long && target->is_contiguous() && target->numel() == rows,
                  "target: expected one contiguous int64 per row");
  return static_cast<const int64_t*>(target->data_ptr());
}

}  // namespace kdkernels
