// What crosses from torch/ into cpu/ and cuda/: plain descriptions of tensors, and each loss's options. No torch, no
// code that depends on an instruction set or a device: every build of the kernels shares these types, so they hold
// data.
#pragma once

#include <stdint.h>

namespace kdkernels {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// One pyramid level, (N, C, H, W), as up to four views that share the sizes. Strides are in elements.
struct FeatureView {
  char* data;
  Dtype dtype;
  int64_t stride[4];
};
struct FeatureLevel {
  int64_t n, c, h, w;
  FeatureView student, teacher, grad;
  const void* mask;  // (N, H, W), contiguous, in the type of the arithmetic; null where the loss has none
};

// Rows of a (..., C) tensor: any leading dimensions, any strides.
constexpr int max_row_dims = 8;
struct RowView {
  char* data;
  Dtype dtype;
  int dims;
  int64_t size[max_row_dims], stride[max_row_dims];
  int64_t column_stride;
};

// A weight that is a number, or lives in a 0-d float32 tensor.
struct DeviceScalar {
  double value;
  const float* pointer;
  double get() const { return pointer ? static_cast<double>(*pointer) : value; }
};

// How a kernel asks for threads: run body(context, begin, end) over [0, count) in pieces of about `grain`. Pieces are
// only a schedule: no result may depend on where they begin.
struct Threads {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, void* context, Body body);
};

// How a row loss is reduced.
struct RowReduction {
  // "mean over rows", and "mean over rows and classes", divide by `average` where it is given.
  enum Kind : int { none = 0, sum = 1, mean_rows = 2, mean_elements = 3 };
  int kind;
  bool has_average;
  DeviceScalar average;

  // What a row's value is multiplied by. A divisor that is not positive gives 0.
  double factor(double counted_rows, double columns) const {
    if (kind == none || kind == sum) return 1;
    double divisor = has_average ? average.get() : counted_rows;
    if (divisor <= 0) return 0;
    if (kind == mean_elements) divisor *= columns;
    return 1 / divisor;
  }
};

// One pair of logits (or coordinates), rows x columns.
struct RowPair {
  int64_t rows, columns;
  RowView student, teacher, grad;
  bool wide;           // arithmetic, loss and statistics in double
  const void* weight;  // one per row, contiguous, in the type of the arithmetic; or null
};

// The losses' options.

struct MaskedMseOptions {
  DeviceScalar foreground_weight, background_weight;
  int normalizer;  // math/masked_mse.h: Normalizer
  bool mean_levels;
};

struct PearsonOptions {
  double eps;
  bool mean_levels, zero_on_constant;
};

// Masked MSE and Pearson on the same features, each with its loss weight.
struct FeatureOptions {
  MaskedMseOptions masked_mse;
  PearsonOptions pearson;
  DeviceScalar masked_mse_weight, pearson_weight;
  bool norms;  // whether the squared norm of each term's gradient is asked for
};
// What the one pass leaves for each level, and in one more row for their sum: the weighted terms, masked MSE's regions
// and both together, and those norms. So whoever wants one number takes a view.
enum FeatureValue : int {
  value_foreground,
  value_background,
  value_masked_mse,
  value_pearson,
  value_masked_mse_norm,
  value_pearson_norm,
  feature_values
};

struct DecoupledKlOptions {
  DeviceScalar foreground_weight, background_weight;
  double foreground_temperature, background_temperature;
  const bool* foreground;  // one per row, contiguous
  int reduction;           // RowReduction: none, sum, or mean_rows for each region divided by its own rows
};

// The levels of a pyramid of masks.
struct MaskGeometry {
  int64_t pictures;
  int levels;
  const int64_t *heights, *widths;  // in cells
  const double* strides;            // pixels per cell
  // levels - 1: the smallest scale of a box on level 1, 2, ...; null: every box on every level.
  const double* thresholds;
};
// boxes: (count, 5) of float32, contiguous: picture, x1, y1, x2, y2; a picture below 0 is padding. masks[k] is written:
// (pictures, heights[k], widths[k]), contiguous.
struct MaskDrawing {
  const float* boxes;
  int64_t count;
  MaskGeometry geometry;
  float* const* masks;
};

struct SoftCrossEntropyOptions {
  double temperature;
  const void* class_weight;  // one per class, contiguous, in the type of the arithmetic; or null
  const int64_t* target;     // one per row, contiguous; or null
  DeviceScalar hard_weight;
  int64_t ignore_index;
  RowReduction reduction;
};

struct BoundedRegressionOptions {
  double margin, beta;
  DeviceScalar bound_weight, smooth_l1_weight;
  int gate;  // math/bounded_regression.h: Gate
  RowReduction reduction;
};

}  // namespace kdkernels
