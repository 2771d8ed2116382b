// The mask of a tile of features (feature.cuh): read once per block, whatever the number of its channels.
#pragma once

#include "feature.cuh"

KD_NAMESPACE_BEGIN

// The mask of a tile's elements in shared memory, laid so that lanes which read elements 8 apart meet no bank twice.
// NCHW: the line's own pixels. channels_last: every element of a line has the pixel's value.
struct MaskTile {
  static constexpr int columns = feature_threads + 2;
  static constexpr int floats = vector_size * columns;
  float* values;

  KD_DEVICE static int at(int element) { return element % vector_size * columns + element / vector_size; }
  KD_DEVICE void load(const Tile& tile) const {
    const FeatureSegment& s = *tile.segment;
    const float* mask = s.mask + tile.outer * s.length;
    for (int i = tile.begin + thread_index(); i < tile.end; i += feature_threads) values[at(i - tile.begin)] = mask[i];
    block_sync();
  }
  KD_DEVICE float operator()(int element) const { return values[at(element)]; }
};

// The mask of a piece's elements.
KD_DEVICE Vector mask_of_piece(const Tile& tile, const MaskTile& mask, int64_t line, const Piece& p) {
  Vector m;
  const float one = tile.segment->channels_inner ? tile.segment->mask[line] : 0.0f;
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    const bool inside = i >= p.begin && i < p.end;
    m.x[i] = tile.segment->channels_inner ? one : (inside ? mask(p.first + i - tile.begin) : 0.0f);
  }
  return m;
}

KD_NAMESPACE_END
