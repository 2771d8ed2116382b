// A piece of a line as it lies in memory: 16-bit floats take half the registers until they are used.
#pragma once

#include "pieces.cuh"

KD_NAMESPACE_BEGIN

// Whether a line's elements follow each other and its whole pieces are vectors.
template <class S>
KD_DEVICE bool starts_vector(const S* line, int64_t step) {
  return step == 1 && reinterpret_cast<uintptr_t>(line) % 16 == 0;
}

template <class S>
struct Packed {
  static_assert(sizeof(S) == 2, "a 16-bit float");
  static constexpr int words = vector_size / 2;
  uint32_t word[words];

  KD_DEVICE float operator[](int i) const { return to_float(element(i)); }
  KD_DEVICE S element(int i) const { return {uint16_t(word[i / 2] >> (i % 2 * 16))}; }
  // Elements i and i + 1; i is even.
  KD_DEVICE void set(int i, float first, float second) { word[i / 2] = pack<S>(first, second); }
  // Into a word that is 0 there.
  KD_DEVICE void put(int i, S x) { word[i / 2] |= uint32_t(x.bits) << (i % 2 * 16); }
};

template <>
struct Packed<float> {
  static constexpr int words = vector_size;
  uint32_t word[words];

  KD_DEVICE float operator[](int i) const { return element(i); }
  KD_DEVICE float element(int i) const {
    float x;
    memcpy(&x, &word[i], 4);
    return x;
  }
  KD_DEVICE void set(int i, float first, float second) {
    put(i, first);
    put(i + 1, second);
  }
  KD_DEVICE void put(int i, float x) { memcpy(&word[i], &x, 4); }
};

// `wide`: starts_vector of the line.
template <class S>
KD_DEVICE void load_packed(Packed<S>& v, const S* line, int64_t step, const Piece& p, bool wide) {
  if (p.whole() && wide) {
    KD_UNROLL for (int k = 0; k < v.words; k += 4) {
      const Bytes16 bytes = load16(reinterpret_cast<const uint32_t*>(line + p.first) + k);
      KD_UNROLL for (int j = 0; j < 4; ++j) v.word[k + j] = bytes.word[j];
    }
    return;
  }
  KD_UNROLL for (int k = 0; k < v.words; ++k) v.word[k] = 0;
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    if (i >= p.begin && i < p.end) v.put(i, line[(p.first + i) * step]);
  }
}

template <class S>
KD_DEVICE void store_packed(const Packed<S>& v, S* line, int64_t step, const Piece& p, bool wide) {
  if (p.whole() && wide) {
    KD_UNROLL for (int k = 0; k < v.words; k += 4) {
      Bytes16 bytes;
      KD_UNROLL for (int j = 0; j < 4; ++j) bytes.word[j] = v.word[k + j];
      store16(reinterpret_cast<uint32_t*>(line + p.first) + k, bytes);
    }
    return;
  }
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    if (i >= p.begin && i < p.end) line[(p.first + i) * step] = v.element(i);
  }
}

KD_NAMESPACE_END
