// How a kernel walks over one pyramid level: in runs of consecutive elements, without copying whatever the layout is.
#pragma once

#include "block.h"

KD_NAMESPACE_BEGIN

// n elements that follow each other in the run's dimension, by their offsets in each tensor.
struct FeatureRun {
  int64_t student, teacher, grad;
  int64_t pixel;    // of the run's first element, in a contiguous (N, H, W)
  int64_t channel;  // of the run's first element
  int n;
};

// NCHW (and anything odd): a unit is one (n, c) plane and runs go along its pixels. channels_last: a unit is a
// group of pixels, a run is one pixel's channels. The units depend on the shape alone, never on the threads.
class FeatureWalk {
 public:
  static constexpr int64_t pixels_per_unit = 64;

  explicit FeatureWalk(const FeatureLevel& level)
      : level_(level), channels_inner(level.student.stride[1] == 1 && level.student.stride[3] != 1) {
    const int dim = channels_inner ? 1 : 3;
    student_step = level.student.stride[dim];
    teacher_step = level.teacher.stride[dim];
    grad_step = level.grad.stride[dim];
    pixels_ = level.h * level.w;
    if (channels_inner) {
      units = (level.n * pixels_ + pixels_per_unit - 1) / pixels_per_unit;
      grain = 1 + 16384 / (pixels_per_unit * (level.c > 0 ? level.c : 1));
    } else {
      units = level.n * level.c;
      grain = 1 + 16384 / (pixels_ > 0 ? pixels_ : 1);
    }
    channel_grain = 1 + 16384 / (level.n * pixels_ > 0 ? level.n * pixels_ : 1);
    if (level.n * level.c * pixels_ == 0) units = 0;
    merged_ = merges(level.student) && merges(level.teacher) && (!level.grad.data || merges(level.grad));
  }

  template <class F>
  KD_HD void runs(int64_t unit, const F& body) const {
    const FeatureLevel& l = level_;
    if (channels_inner) {
      const int64_t first = unit * pixels_per_unit, total = l.n * pixels_;
      const int64_t last = first + pixels_per_unit < total ? first + pixels_per_unit : total;
      for (int64_t pixel = first; pixel < last; ++pixel) {
        const int64_t n = pixel / pixels_, y = pixel % pixels_ / l.w, x = pixel % l.w;
        pieces(at(l.student, n, 0, y, x), at(l.teacher, n, 0, y, x), at(l.grad, n, 0, y, x), pixel, 0, 0, l.c, body);
      }
    } else {
      const int64_t n = unit / l.c, c = unit % l.c;
      const int64_t rows = merged_ ? 1 : l.h, length = merged_ ? pixels_ : l.w;
      for (int64_t y = 0; y < rows; ++y) {
        pieces(at(l.student, n, c, y, 0), at(l.teacher, n, c, y, 0), at(l.grad, n, c, y, 0), n * pixels_ + y * l.w, c,
               1, length, body);
      }
    }
  }

  // NCHW: all pictures' runs of one channel.
  template <class F>
  KD_HD void channel_runs(int64_t channel, const F& body) const {
    for (int64_t n = 0; n < level_.n; ++n) runs(n * level_.c + channel, body);
  }

  // The offset of a pixel, counted over the batch, at one channel.
  int64_t at_pixel(const FeatureView& v, int64_t pixel, int64_t channel) const {
    return at(v, pixel / pixels_, channel, pixel % pixels_ / level_.w, pixel % level_.w);
  }

 private:
  const FeatureLevel& level_;
  int64_t pixels_;
  bool merged_;

  bool merges(const FeatureView& v) const { return v.stride[2] == level_.w * v.stride[3]; }

  static int64_t at(const FeatureView& v, int64_t n, int64_t c, int64_t y, int64_t x) {
    return n * v.stride[0] + c * v.stride[1] + y * v.stride[2] + x * v.stride[3];
  }

  template <class F>
  KD_HD void pieces(int64_t s, int64_t t, int64_t g, int64_t pixel, int64_t channel, int pixel_step, int64_t length,
                    const F& body) const {
    for (int64_t i = 0; i < length; i += block_size) {
      const int n = int(length - i < block_size ? length - i : block_size);
      body(FeatureRun{s + i * student_step, t + i * teacher_step, g + i * grad_step, pixel + i * pixel_step,
                      channels_inner ? i : channel, n});
    }
  }

 public:
  bool channels_inner;
  int64_t student_step, teacher_step, grad_step;
  int64_t units, grain, channel_grain;
};

KD_NAMESPACE_END
