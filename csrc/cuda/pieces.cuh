// Pieces of a line of elements: a vector of them, or the part of one that lies in the line.
#pragma once

#include "primitives.cuh"

KD_NAMESPACE_BEGIN

// Up to vector_size neighbouring elements of a line, [first + begin, first + end). Whole pieces of lines whose elements
// follow each other are vectors.
struct Piece {
  int first, begin, end;

  KD_DEVICE bool any() const { return begin < end; }
  KD_DEVICE bool whole() const { return begin == 0 && end == vector_size; }
};

template <class S>
KD_DEVICE bool aligned(const S* line, int64_t step, int first) {
  return step == 1 && (reinterpret_cast<uintptr_t>(line) + uintptr_t(int64_t(first) * int64_t(sizeof(S)))) % 16 == 0;
}

template <class S>
KD_DEVICE Vector load_piece(const S* line, int64_t step, const Piece& p) {
  if (p.whole() && aligned(line, step, p.first)) return load_vector(line + p.first);
  Vector v;
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    v.x[i] = i >= p.begin && i < p.end ? to_float(line[(p.first + i) * step]) : 0.0f;
  }
  return v;
}

template <class S>
KD_DEVICE void store_piece(S* line, int64_t step, const Piece& p, const Vector& v) {
  if (p.whole() && aligned(line, step, p.first)) {
    store_vector(line + p.first, v);
    return;
  }
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    if (i >= p.begin && i < p.end) line[(p.first + i) * step] = from_float<S>(v.x[i]);
  }
}

KD_NAMESPACE_END
