// Pearson's kernels over pixels (channels_last): a thread has a vector of neighbouring channels and every so many
// pixels of a chunk (channel.cuh). The sums of its eight channels stay in registers; their bases lie in shared memory.
#pragma once

#include "pearson_planes.cuh"

KD_NAMESPACE_BEGIN

// The base of one channel from a few pixels that are spread over the chunk.
template <class S, class T>
KD_DEVICE Base sampled_base(const PixelTeam& team, int channel) {
  constexpr int samples = 16;
  const int64_t count = team.last - team.first;
  const int64_t channel_s = channel * team.segment.student.stride[1];
  const int64_t channel_t = channel * team.segment.teacher.stride[1];
  float s[samples], t[samples];
  KD_UNROLL for (int i = 0; i < samples; ++i) {
    const PixelPlace<S, T> at(team, team.first + count * i / samples);
    s[i] = to_float(at.s[channel_s]);
    t[i] = to_float(at.t[channel_t]);
  }
  Base base;
  base.s.from = s[0];
  base.t.from = t[0];
  float x = 0, y = 0, xx = 0, yy = 0, xy = 0, most_x = 0, most_y = 0;
  KD_UNROLL for (int i = 0; i < samples; ++i) {
    x += s[i] - base.s.from;
    y += t[i] - base.t.from;
  }
  move(base.s, x / samples, false, 0);
  move(base.t, y / samples, false, 0);
  KD_UNROLL for (int i = 0; i < samples; ++i) {
    const float a = base.s(s[i]), b = base.t(t[i]);
    xx += a * a;
    yy += b * b;
    xy += a * b;
    most_x = fmaxf(most_x, a * a);
    most_y = fmaxf(most_y, b * b);
  }
  // A sample whose sums one or two values decide says nothing of the rest.
  const bool spread = 3 * most_x < xx && 3 * most_y < yy;
  base.slope = spread ? slope_of_sample(xx, yy, xy) : 0.0f;
  return base;
}

// Eight numbers for each channel of a block, in shared memory. Threads of neighbouring vectors meet no bank twice.
struct ChannelRows {
  struct alignas(16) Quad {
    float x[4];
  };
  static constexpr int vector_floats = 8 * vector_size + 4;
  static constexpr int floats = most_pixel_vectors * vector_floats;
  float* rows;

  KD_DEVICE float* at(int vector, int i) const { return rows + vector * vector_floats + i * 8; }
  KD_DEVICE float* at(int channel) const { return at(channel / vector_size, channel % vector_size); }

  KD_DEVICE static void get(float (&row)[8], const float* from) {
    const Quad* quads = reinterpret_cast<const Quad*>(from);
    const Quad low = quads[0], high = quads[1];
    KD_UNROLL for (int k = 0; k < 4; ++k) {
      row[k] = low.x[k];
      row[k + 4] = high.x[k];
    }
  }
};

// Shared memory of a block: each thread's sums, one number after another; the bases of its channels; their totals.
struct PixelMemory {
  static constexpr int channels = most_pixel_vectors * vector_size, sum_floats = 8;
  static constexpr int floats = sum_floats * vector_size * pixel_threads + ChannelRows::floats + sum_floats * channels +
                                pixel_threads / warp_size;
  float* sums;  // [sum_floats][vector_size][pixel_threads]
  ChannelRows bases;
  float* totals;  // [sum_floats][channels]
  float* flags;   // one per warp

  KD_DEVICE explicit PixelMemory(float* memory) {
    sums = memory;
    bases.rows = sums + sum_floats * vector_size * pixel_threads;
    totals = bases.rows + ChannelRows::floats;
    flags = totals + sum_floats * channels;
  }

  KD_DEVICE void put(int channel, const Base& base) const {
    const float values[] = {base.s.from, base.s.scale, base.s.offset, base.slope,
                            base.t.from, base.t.scale, base.t.offset, 0};
    KD_UNROLL for (int k = 0; k < 8; ++k) bases.at(channel)[k] = values[k];
  }
  KD_DEVICE Base get(int channel) const { return get(channel / vector_size, channel % vector_size); }
  KD_DEVICE Base get(int vector, int i) const {
    float row[8];
    ChannelRows::get(row, bases.at(vector, i));
    return Base{Side{row[0], row[1], row[2]}, Side{row[4], row[5], row[6]}, row[3]};
  }

  // The sums of the block's channels from those of its threads, in an order that depends on the team alone.
  KD_DEVICE void add_up(PairSums (&mine)[vector_size], const PixelTeam& team) const {
    KD_UNROLL for (int i = 0; i < vector_size; ++i) {
      float* to = sums + i * pixel_threads + thread_index();
      const auto put_next = [&](float& x) {
        *to = x;
        to += vector_size * pixel_threads;
      };
      mine[i].each_sum(put_next);
      mine[i].each_maximum(put_next);
    }
    block_sync();
    constexpr int chains = 4;
    const int vectors = team.segment.team;
    for (int out = thread_index(); out < sum_floats * vector_size * vectors; out += pixel_threads) {
      const int number = out / vectors, vector = out % vectors, i = number % vector_size, k = number / vector_size;
      const float* from = sums + number * pixel_threads + vector;
      float part[chains] = {};
      for (int row = 0; row < team.rows; row += chains) {
        KD_UNROLL for (int j = 0; j < chains; ++j) {
          // Neighbouring numbers begin at different rows: their threads meet no bank twice.
          const float x = from[(row + j + number) % team.rows * vectors];
          part[j] = k < 6 ? part[j] + x : fmaxf(part[j], x);
        }
      }
      const float low = k < 6 ? part[0] + part[1] : fmaxf(part[0], part[1]);
      const float high = k < 6 ? part[2] + part[3] : fmaxf(part[2], part[3]);
      totals[k * channels + vector * vector_size + i] = k < 6 ? low + high : fmaxf(low, high);
    }
    block_sync();
  }
  KD_DEVICE PairSums total(int channel) const {
    PairSums sums;
    const float* from = totals + channel;
    const auto get_next = [&](float& x) {
      x = *from;
      from += channels;
    };
    sums.each_sum(get_next);
    sums.each_maximum(get_next);
    return sums;
  }
};

template <class S, class T>
KD_GLOBAL(pixel_threads, 3)
pearson_pixel_sums(const ChannelTable table, float* results) {
  constexpr int batch = sizeof(T) == 2 ? 4 : 2;
  const PixelTeam team(find_segment(table));
  const PixelMemory memory(shared_memory<float>());
  // Thread i looks after the block's channel i.
  if (thread_index() < PixelMemory::channels) {
    const bool exists = thread_index() < team.channels;
    memory.put(thread_index(), exists ? sampled_base<S, T>(team, thread_index()) : Base());
  }
  block_sync();
  for (int pass = 1;; ++pass) {
    PairSums sums[vector_size];
    for_pixels<batch, S, T>(team, [&](const auto& s, const auto& t, const auto&, int64_t) {
      constexpr int pixels = sizeof(s) / sizeof(s[0]);
      KD_UNROLL for (int i = 0; i < vector_size; ++i) {
        float of_s[pixels], of_t[pixels];
        KD_UNROLL for (int b = 0; b < pixels; ++b) {
          of_s[b] = s[b][i];
          of_t[b] = t[b][i];
        }
        sums[i].add(memory.get(team.vector, i), of_s, of_t);
      }
    });
    memory.add_up(sums, team);
    bool again = false;
    if (thread_index() < team.channels && pass < most_passes) {
      Base base = memory.get(thread_index());
      again = improve(base, memory.total(thread_index()), float(team.last - team.first));
      if (again) memory.put(thread_index(), base);
    }
    if (!any_of_block(again, memory.flags)) break;
  }
  if (thread_index() >= team.channels) return;
  const ChannelSegment& segment = team.segment;
  const int64_t channel = team.first_channel + thread_index();
  float* partial = results + segment.first_result + team.chunk * partial_floats * segment.channels + channel;
  each_of_partial(memory.get(thread_index()), memory.total(thread_index()), float(team.last - team.first),
                  [&](int k, float value) { partial[k * segment.channels] = value; });
}

template <class S, class T>
KD_GLOBAL(pixel_threads, 3)
pearson_pixel_gradients(const ChannelTable table, const float* grad_loss, const float* statistics) {
  constexpr int batch = sizeof(T) == 2 ? 4 : 2;
  const PixelTeam team(find_segment(table));
  const ChannelSegment& segment = team.segment;
  const ChannelRows rows{shared_memory<float>()};
  const float* first = statistics + (segment.first_channel + team.first_channel) * statistics_per_channel;
  for (int i = thread_index(); i < team.channels * statistics_per_channel; i += pixel_threads) {
    rows.at(i / statistics_per_channel)[i % statistics_per_channel] = first[i];
  }
  block_sync();
  const Piece p = team.piece();
  const float upstream = *grad_loss;
  for_pixels<batch, S, T>(team, [&](const auto& s, const auto& t, const auto& to, int64_t) {
    constexpr int pixels = sizeof(s) / sizeof(s[0]);
    Packed<S> g[pixels];
    KD_UNROLL for (int i = 0; i < vector_size; i += 2) {
      Gradient first, second;
      ChannelRows::get(first.row, rows.at(team.vector, i));
      ChannelRows::get(second.row, rows.at(team.vector, i + 1));
      KD_UNROLL for (int b = 0; b < pixels; ++b) {
        g[b].set(i, first(upstream, s[b][i], t[b][i]), second(upstream, s[b][i + 1], t[b][i + 1]));
      }
    }
    const int64_t step = segment.grad.stride[1];
    KD_UNROLL for (int b = 0; b < pixels; ++b) store_packed(g[b], to[b], step, p, starts_vector(to[b], step));
  });
}

constexpr int pixel_gradient_floats = ChannelRows::floats;

KD_NAMESPACE_END
