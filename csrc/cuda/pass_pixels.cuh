// Pearson and masked MSE of pixels (channels_last), loss and gradient: a channel's pixels are all over the level, so
// its sums come first (pearson_pixel_sums), then its statistics, then the gradient from a second read.
#pragma once

#include "feature_pass.cuh"
#include "pearson_pixels.cuh"

KD_NAMESPACE_BEGIN

struct PixelsSegment : ChannelSegment {
  Region region;
  int level;
};
using PixelsTable = SegmentTable<PixelsSegment>;
static_assert(sizeof(PixelsTable) + sizeof(PassOptions) < 4000, "leaves room for a kernel's other arguments");

// A level whose chunks' results wait in the workspace.
struct StatisticsSegment {
  int64_t first_result, first_channel, chunks, channels, pixels;
  int64_t first_block;  // of the launch
  int level;

  int64_t blocks() const { return divided(channels, plan::statistics_channels); }
};
using StatisticsTable = SegmentTable<StatisticsSegment>;

// A few threads have a channel, each of them every so many of its chunks.
KD_GLOBAL(plan::statistics_threads, 1)
feature_statistics_finish(const StatisticsTable table, const float* results, const PassOptions options,
                          float* statistics, float* parts) {
  constexpr int lanes = plan::statistics_lanes;
  const StatisticsSegment& segment = find_segment(table);
  const int64_t channel = (block_index() - segment.first_block) * plan::statistics_channels + thread_index() / lanes;
  const bool inside = channel < segment.channels;
  ChannelMoments moments;
  for (int64_t chunk = thread_index() % lanes; inside && chunk < segment.chunks; chunk += lanes) {
    const float* partial = results + segment.first_result + chunk * partial_floats * segment.channels + channel;
    moments.merge(ChannelMoments::of_partial([&](int k) { return double(partial[k * segment.channels]); }));
  }
  KD_UNROLL for (int bits = 1; bits < lanes; bits *= 2) {
    ChannelMoments other = moments;
    other.each([&](double& x) { x = shuffle_xor_double(x, bits); });
    moments.merge(other);
  }
  PassSums sums;
  if (inside && thread_index() % lanes == 0) {
    const double samples = double(segment.pixels);
    const double share = weight_value(options.terms.pearson_weight) * options.pearson_share;
    float* row = statistics + (segment.first_channel + channel) * statistics_per_channel;
    sums.value[part_pearson] = float(
        finish_channel(moments, samples, share / (double(segment.channels) * samples), options.terms.pearson, row));
  }
  sums.leave(shared_memory<float>(), parts);
}

// Shared memory of a block of the gradient: the channels' statistics, the regions' factors, the sums of the warps.
constexpr int pixel_warps = pixel_threads / warp_size;
constexpr int feature_pixel_floats = ChannelRows::floats + 4 + pass_parts * pixel_warps;

template <class S, class T>
KD_GLOBAL(pixel_threads, 3)
feature_pixels(const PixelsTable table, const float* counts, const PassOptions options, const float* statistics,
               float* parts) {
  constexpr int batch = 4 / sizeof(T);
  const PixelsSegment& segment = find_segment(table);
  const PixelTeam team(segment);
  const ChannelRows rows{shared_memory<float>()};
  float* scratch = rows.rows + ChannelRows::floats;
  RegionFactors* found = reinterpret_cast<RegionFactors*>(scratch);
  const float* first = statistics + (segment.first_channel + team.first_channel) * statistics_per_channel;
  for (int i = thread_index(); i < segment.team * vector_size * statistics_per_channel; i += pixel_threads) {
    const int channel = i / statistics_per_channel;
    rows.at(channel)[i % statistics_per_channel] = channel < team.channels ? first[i] : 0.0f;
  }
  find_factors(segment.region, counts, options, found);
  block_sync();
  const Piece p = team.piece();
  const float* mask = segment.region.mask;
  const RegionFactors factors = *found;
  PassSums sums;
  for_pixels<batch, S, T>(team, [&](const auto& s, const auto& t, const auto& to, int64_t pixel) {
    constexpr int pixels = sizeof(s) / sizeof(s[0]);
    float m[pixels];
    KD_UNROLL for (int b = 0; b < pixels; ++b) m[b] = mask ? mask[pixel + b * team.rows] : 0.0f;
    Packed<S> g[pixels];
    float masked_mse_norm = 0, pearson_norm = 0;
    RegionSums<float> squares{0, 0};
    KD_UNROLL for (int i = 0; i < vector_size; i += 2) {
      Gradient gradient[2];
      ChannelRows::get(gradient[0].row, rows.at(team.vector, i));
      ChannelRows::get(gradient[1].row, rows.at(team.vector, i + 1));
      KD_UNROLL for (int b = 0; b < pixels; ++b) {
        float x[2];
        KD_UNROLL for (int j = 0; j < 2; ++j) {
          x[j] = gradient[j](s[b][i + j], t[b][i + j]);
          pearson_norm += x[j] * x[j];
          if (mask) x[j] += PassSums::masked_mse(squares, masked_mse_norm, s[b][i + j], t[b][i + j], m[b], factors);
        }
        g[b].set(i, x[0], x[1]);
      }
    }
    sums.add(squares, masked_mse_norm, pearson_norm);
    if (!segment.grad.data) return;
    const int64_t step = segment.grad.stride[1];
    KD_UNROLL for (int b = 0; b < pixels; ++b) store_packed(g[b], to[b], step, p, starts_vector(to[b], step));
  });
  sums.leave(scratch + 4, parts);
}

KD_NAMESPACE_END
