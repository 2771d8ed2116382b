// Calls of several ops, packed into one: their arguments in the order of their schemas, by kind. A list travels as its
// length and its elements, what may be None as whether it is there. losses/joint_pass.py packs.
#pragma once

#include <tuple>
#include <type_traits>

#include "tensors.h"

namespace kdkernels {

class PackedCalls {
 public:
  PackedCalls(const std::vector<Tensor>& tensors, const std::vector<int64_t>& integers,
              const std::vector<double>& numbers)
      : tensors_(tensors), integers_(integers), numbers_(numbers) {}

  bool done() const { return integer_ == integers_.size(); }
  int64_t integer() { return take(One<int64_t>()); }

  // What `function` returns for the next arguments, one of each of its parameters' types.
  template <class R, class... A>
  R call(R (*function)(A...)) {
    return std::apply(function, std::tuple<A...>{take(One<A>())...});  // braces: from left to right
  }

 private:
  template <class T>
  struct One {};

  const std::vector<Tensor>& tensors_;
  const std::vector<int64_t>& integers_;
  const std::vector<double>& numbers_;
  size_t tensor_ = 0, integer_ = 0, number_ = 0;

  template <class T>
  static const T& next(const std::vector<T>& from, size_t& at) {
    STD_TORCH_CHECK(at < from.size(), "packed calls end in an argument");
    return from[at++];
  }
  Tensor take(One<Tensor>) { return next(tensors_, tensor_); }
  int64_t take(One<int64_t>) { return next(integers_, integer_); }
  bool take(One<bool>) { return integer() != 0; }
  double take(One<double>) { return next(numbers_, number_); }
  template <class T>
  std::optional<T> take(One<std::optional<T>>) {
    if (!take(One<bool>())) return std::nullopt;
    return take(One<T>());
  }
  template <class T>
  std::vector<T> take(One<std::vector<T>>) {
    std::vector<T> found;
    for (int64_t left = integer(); left > 0; --left) found.push_back(take(One<T>()));
    return found;
  }
};

}  // namespace kdkernels
