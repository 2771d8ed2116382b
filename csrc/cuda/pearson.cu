// Pearson-normalised feature loss (PKD) on the GPU. Forward: one launch for all levels, which reads each feature once
// (2b per element) and leaves 12 floats per chunk of a channel, and one that merges them in double and forms statistics
// and loss. Backward: one launch, 3b. Workspace: a few thousandths of the features' bytes.
#include "pearson.h"

#include <vector>

#include "pearson_pixels.cuh"
#include "pearson_planes.cuh"

KD_NAMESPACE_BEGIN

namespace {

// Finishing: a group of threads has a channel, each of them every so many of its chunks.
constexpr int finish_threads = 512, finish_lanes = 4, finish_channels = finish_threads / finish_lanes;

struct FinishLevel {
  int64_t first_result, chunks;  // no chunks: an empty level
  int64_t channels, first_channel;
  double samples;  // per channel
};
constexpr int max_finish_levels = 64;
struct FinishTable {
  int count;
  bool first;  // the first of several launches starts the loss
  int64_t channels;
  double share;
  FinishLevel level[max_finish_levels];
};

// `blocks` blocks: one cluster, whose first block has the loss, or blocks that leave their sums in `totals`.
KD_GLOBAL(finish_threads, 1)
pearson_finish(const FinishTable table, const float* results, PearsonOptions options, int blocks, double* totals,
               float* loss, float* statistics) {
  const int lane = thread_index() % finish_lanes;
  double total = 0;
  for (int64_t first = block_index() * finish_channels; first < table.channels;
       first += int64_t(blocks) * finish_channels) {
    const int64_t index = first + thread_index() / finish_lanes;
    const bool inside = index < table.channels;
    ChannelMoments moments;
    int at = 0;
    int64_t channel = index;
    while (inside && channel >= table.level[at].channels) channel -= table.level[at++].channels;
    const FinishLevel& level = table.level[at];
    for (int64_t chunk = lane; inside && chunk < level.chunks; chunk += finish_lanes) {
      const float* partial = results + level.first_result + chunk * partial_floats * level.channels + channel;
      moments.merge(ChannelMoments::of_partial([&](int k) { return double(partial[k * level.channels]); }));
    }
    KD_UNROLL for (int bits = 1; bits < finish_lanes; bits *= 2) {
      ChannelMoments other = moments;
      other.each([&](double& x) { x = shuffle_xor_double(x, bits); });
      moments.merge(other);
    }
    if (inside && lane == 0) {
      float* row = statistics + (level.first_channel + channel) * statistics_per_channel;
      const double elements = double(level.channels) * level.samples;
      total += finish_channel(moments, level.samples, elements > 0 ? table.share / elements : 0, options, row);
    }
  }
  double* scratch = shared_memory<double>();
  scratch[thread_index()] = total;
  block_sync();
  for (int half = finish_threads / 2; half > 0; half /= 2) {
    if (thread_index() < half) scratch[thread_index()] += scratch[thread_index() + half];
    block_sync();
  }
  if (cluster_blocks() == 1) {
    if (thread_index() == 0) totals[block_index()] = scratch[0];
    return;
  }
  cluster_sync();
  if (cluster_rank() == 0 && thread_index() == 0) {
    double sum = 0;
    for (int i = 0; i < blocks; ++i) sum += *peer_shared(scratch, i);
    *loss = float(table.first ? sum : *loss + sum);
  }
  cluster_sync();  // no block ends before its sum was read
}

// Where there are no clusters.
KD_GLOBAL(warp_size, 1) pearson_total(const double* totals, int blocks, bool first, float* loss) {
  if (thread_index() != 0) return;
  double sum = 0;
  for (int i = 0; i < blocks; ++i) sum += totals[i];
  *loss = float(first ? sum : *loss + sum);
}

constexpr int cluster_size = 8, finish_blocks = 32;
constexpr int64_t total_floats = 2 * finish_blocks;  // of the workspace, before the chunks' results

const char* finish(const FinishTable& table, float* workspace, const PearsonOptions& options, float* loss,
                   float* statistics, void* stream) {
  const bool clusters = capability_of(pearson_finish) >= 90;
  const int blocks = clusters ? cluster_size : finish_blocks;
  double* totals = reinterpret_cast<double*>(workspace);
  const Launch how{blocks, finish_threads, int(sizeof(double)) * finish_threads, stream, clusters ? cluster_size : 1};
  const char* error = launch(pearson_finish, how, table, workspace, options, blocks, totals, loss, statistics);
  if (error || clusters) return error;
  return launch(pearson_total, Launch{1, warp_size, 0, stream}, totals, blocks, table.first, loss);
}

// The plans of all levels.
struct Plans {
  const FeatureLevel* levels;
  int count;
  int64_t elements = 0;

  Plans(const FeatureLevel* l, int n) : levels(l), count(n) {
    for (int i = 0; i < count; ++i) elements += levels[i].n * levels[i].c * levels[i].h * levels[i].w;
  }

  ChannelSegment of(int i) const {
    return channels_inner(levels[i]) ? plan_pixels(levels[i], elements) : plan_planes(levels[i]);
  }
  int64_t result_floats(int i) const { return of(i).chunks * partial_floats * levels[i].c; }

  // Calls body(S(), T(), table, whether it is of pixels) until each level that is not empty was in a table. Of level i,
  // the results begin at results[i] and the channels among all at channels[i]; either may be null where it is not
  // needed.
  template <class F>
  const char* for_each(const int64_t* results, const int64_t* channels, const F& body) const {
    const char* error = nullptr;
    for (const bool pixels : {false, true}) {
      const auto plan = [&](const FeatureLevel& level, int i) {
        ChannelSegment s = channels_inner(level) == pixels ? of(i) : ChannelSegment{};
        s.first_result = results ? results[i] : 0;
        s.first_channel = channels ? channels[i] : 0;
        return s;
      };
      const auto with_layout = [&](auto s, auto t, const ChannelTable& table) { return body(s, t, table, pixels); };
      if (!error) error = for_each_table<ChannelSegment>(levels, count, plan, with_layout);
    }
    return error;
  }
};

}  // namespace

int64_t pearson_workspace(const FeatureLevel* levels, int count) {
  const Plans plans(levels, count);
  int64_t floats = total_floats;
  for (int i = 0; i < count; ++i) floats += plans.result_floats(i);
  return floats;
}

const char* pearson_forward(const FeatureLevel* levels, int count, const PearsonOptions& options, float* workspace,
                            float* loss, float* statistics, void* stream) {
  const Plans plans(levels, count);
  std::vector<int64_t> first_result(size_t(count) + 1, total_floats);
  for (int i = 0; i < count; ++i) first_result[i + 1] = first_result[i] + plans.result_floats(i);
  const char* error =
      plans.for_each(first_result.data(), nullptr, [&](auto s, auto t, const ChannelTable& table, bool pixels) {
        using S = decltype(s);
        using T = decltype(t);
        const int threads = pixels ? pixel_threads : plane_threads;
        const int floats = pixels ? PixelMemory::floats : plane_floats;
        const Launch how{table.blocks, threads, int(sizeof(float)) * floats, stream};
        return launch(pixels ? pearson_pixel_sums<S, T> : pearson_plane_sums<S, T>, how, table, workspace);
      });
  FinishTable table{};
  table.first = true;
  table.share = options.mean_levels ? 1.0 / count : 1.0;
  int64_t first_channel = 0;
  for (int i = 0; i < count && !error; ++i) {
    const FeatureLevel& level = levels[i];
    const double samples = double(level.n) * double(level.h) * double(level.w);
    table.level[table.count++] = {first_result[i], plans.of(i).chunks, level.c, first_channel, samples};
    table.channels += level.c;
    first_channel += level.c;
    if (table.count < max_finish_levels && i + 1 < count) continue;
    error = finish(table, workspace, options, loss, statistics, stream);
    table.first = false;
    table.count = 0;
    table.channels = 0;
  }
  return error;
}

const char* pearson_backward(const FeatureLevel* levels, int count, const float* grad_loss, const float* statistics,
                             const int64_t* first_channel, void* stream) {
  const Plans plans(levels, count);
  return plans.for_each(nullptr, first_channel, [&](auto s, auto t, const ChannelTable& table, bool pixels) {
    using S = decltype(s);
    using T = decltype(t);
    const int threads = pixels ? pixel_threads : plane_threads, floats = pixels ? pixel_gradient_floats : 0;
    const Launch how{table.blocks, threads, int(sizeof(float)) * floats, stream};
    return launch(pixels ? pearson_pixel_gradients<S, T> : pearson_plane_gradients<S, T>, how, table, grad_loss,
                  statistics);
  });
}

KD_NAMESPACE_END
