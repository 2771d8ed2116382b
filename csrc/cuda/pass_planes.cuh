// Loss and gradient of planes in one pass (feature_plan.h, FeatureKernel::planes): what a block or a cluster reads of a
// channel for its statistics stays in shared memory for the gradient, as far as it fits.
#pragma once

#include "feature_pass.cuh"

KD_NAMESPACE_BEGIN

using plan::slice_threads;

struct PlanesSegment : ChannelSegment {
  Region region;
  int64_t kept;       // vectors of a team that stay on chip
  int64_t of_launch;  // blocks, with those that fill the last cluster
  bool pearson;
  int level;

  int64_t blocks() const { return of_launch; }
};
using PlanesTable = SegmentTable<PlanesSegment>;
static_assert(sizeof(PlanesTable) + sizeof(PassOptions) < 4000, "leaves room for a kernel's other arguments");

// Shared memory of a block, before the slice.
struct SliceScratch {
  float* warps;     // 16 floats each, and one more
  float* partials;  // of the teams: what they leave of their chunk
  float* rows;      // of the teams: their channels' statistics
  RegionFactors* factors;

  KD_DEVICE explicit SliceScratch(float* memory) {
    warps = memory;
    partials = warps + 17 * plan::slice_warps;
    rows = partials + partial_floats * plan::slice_teams;
    factors = reinterpret_cast<RegionFactors*>(rows + statistics_per_channel * plan::slice_teams);
  }
  KD_DEVICE float* flags() const { return warps + 16 * plan::slice_warps; }
};
static_assert(partial_floats + statistics_per_channel == 20, "slice_scratch_floats");

// The vectors that the block keeps, each as 16-byte words: neighbouring vectors lie side by side.
template <class S, class T>
struct Slice {
  static constexpr int of_student = Packed<S>::words / 4, of_teacher = Packed<T>::words / 4;
  Bytes16* first;  // this team's
  int vectors;     // of the block

  KD_DEVICE Slice(float* memory, const PlaneTeam& team, int kept) {
    vectors = block_threads() / team.size * kept;
    first = reinterpret_cast<Bytes16*>(memory) + thread_index() / team.size * kept;
  }
  template <class E>
  KD_DEVICE void put(int vector, int word, const Packed<E>& v) const {
    KD_UNROLL for (int k = 0; k < v.words; k += 4) {
      first[(word + k / 4) * vectors + vector] = Bytes16{{v.word[k], v.word[k + 1], v.word[k + 2], v.word[k + 3]}};
    }
  }
  template <class E>
  KD_DEVICE void get(int vector, int word, Packed<E>& v) const {
    KD_UNROLL for (int k = 0; k < v.words; k += 4) {
      const Bytes16 bytes = first[(word + k / 4) * vectors + vector];
      KD_UNROLL for (int j = 0; j < 4; ++j) v.word[k + j] = bytes.word[j];
    }
  }
};

// The mask of a piece's elements; 0 outside.
KD_DEVICE Vector load_mask(const float* line, const Piece& p) {
  Vector m;
  if (p.whole() && aligned(line, 1, p.first)) {
    const Bytes16 low = load16_shared_by_blocks(line + p.first), high = load16_shared_by_blocks(line + p.first + 4);
    memcpy(m.x, &low, 16);
    memcpy(m.x + 4, &high, 16);
    return m;
  }
  KD_UNROLL for (int i = 0; i < vector_size; ++i) m.x[i] = i >= p.begin && i < p.end ? line[p.first + i] : 0.0f;
  return m;
}

// Calls body(piece, student, teacher, mask, gradient's line, whether whole pieces of it are vectors) for each of this
// thread's pieces, `batch` of them in flight. Mask and line are for the gradient's sweep alone.
template <int batch, bool gradient, class S, class T, class F>
KD_DEVICE void for_slice(const PlaneTeam& team, const PlanesSegment& segment, const Slice<S, T>& slice, bool first,
                         const F& body) {
  if (team.lane >= team.count) return;
  PlaneCursor<S, T> at(team, team.lane);
  const int lines_on = team.size / segment.vectors, vectors_on = team.size % segment.vectors;
  const int kept = int(segment.kept);
  KD_NO_UNROLL for (int i = team.lane; i < team.count; i += batch * team.size) {
    Piece p[batch];
    Packed<S> s[batch];
    Packed<T> t[batch];
    Vector m[batch];
    S* g[batch];
    bool wide[batch];
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      const int vector = i + b * team.size;
      p[b] = Piece{0, 0, 0};
      if (vector >= team.count) continue;
      if (i > team.lane || b > 0) at.go_on(lines_on, vectors_on);
      p[b] = at.piece();
      if (!p[b].any()) continue;
      if (!first && vector < kept) {
        slice.get(vector, 0, s[b]);
        slice.get(vector, slice.of_student, t[b]);
      } else {
        load_packed(s[b], at.s, segment.student.stride[3], p[b], at.wide_s);
        load_packed(t[b], at.t, segment.teacher.stride[3], p[b], at.wide_t);
      }
      g[b] = at.g;
      wide[b] = at.wide_g;
      if (gradient) {
        const int64_t pixel = (int64_t(at.picture) * segment.rows + at.row) * segment.length - at.ahead;
        if (segment.region.mask) m[b] = load_mask(segment.region.mask + pixel, p[b]);
      }
    }
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      if (!p[b].any()) continue;
      if (first && i + b * team.size < kept) {
        slice.put(i + b * team.size, 0, s[b]);
        slice.put(i + b * team.size, slice.of_student, t[b]);
      }
      body(p[b], s[b], t[b], m[b], g[b], wide[b]);
    }
  }
}

// The statistics of the teams' channels, at scratch.rows; returns their loss, of this thread. Ends before a barrier.
template <class S, class T>
KD_DEVICE float find_statistics(const PlaneTeam& team, const PlanesSegment& segment, const Slice<S, T>& slice,
                                const SliceScratch& scratch, const PassOptions& options) {
  constexpr int batch = read_ahead * (sizeof(T) == 2 ? 2 : 1);
  Base base = sampled_base<S, T>(team);
  PairSums sums;
  float count;
  for (int pass = 1;; ++pass) {
    sums = PairSums();
    int found = 0;
    for_slice<batch, false>(team, segment, slice, pass == 1,
                            [&](const Piece& p, const Packed<S>& s, const Packed<T>& t, const Vector&, S*, bool) {
                              add_piece(sums, found, base, p, s, t);
                            });
    count = float(found);
    sum_team(team, sums, count, scratch.warps);
    const bool again = pass < most_passes && count > 0 && improve(base, sums, count);
    if (!any_of_block(again, scratch.flags())) break;
  }
  const int index = thread_index() / team.size;
  float* partial = scratch.partials + index * partial_floats;
  if (team.lane == 0) each_of_partial(base, sums, count, [&](int k, float value) { partial[k] = value; });
  const int chunks = int(segment.chunks);
  ChannelMoments moments;
  if (chunks > 1) {  // a channel of several blocks of the cluster: each of them merges all parts, in their order
    cluster_sync();
    if (thread_index() < warp_size) {
      if (thread_index() < chunks) {
        const float* of_chunk = peer_shared(scratch.partials, cluster_rank() / chunks * chunks + thread_index());
        moments = ChannelMoments::of_partial([&](int k) { return double(of_chunk[k]); });
      }
      for (int bits = 1; bits < chunks; bits *= 2) {
        ChannelMoments other = moments;
        other.each([&](double& x) { x = shuffle_xor_double(x, bits); });
        moments.merge(other);
      }
    }
  } else if (team.lane == 0) {
    moments = ChannelMoments::of_partial([&](int k) { return double(partial[k]); });
  }
  if (team.lane != 0 || team.channel >= segment.channels) return 0;
  const double samples = double(segment.pixels);
  const double weight = weight_value(options.terms.pearson_weight) * options.pearson_share;
  const double loss = finish_channel(moments, samples, weight / (double(segment.channels) * samples),
                                     options.terms.pearson, scratch.rows + index * statistics_per_channel);
  return team.chunk == 0 ? float(loss) : 0.0f;
}

template <class S, class T>
KD_GLOBAL(slice_threads, 1)
feature_planes(const PlanesTable table, const float* counts, const PassOptions options, float* parts) {
  constexpr int batch = sizeof(T) == 2 ? 2 : 1;
  const PlanesSegment& segment = find_segment(table);
  const PlaneTeam team(segment);
  float* memory = shared_memory<float>();
  const SliceScratch scratch(memory);
  const Slice<S, T> slice(memory + plan::slice_scratch_floats, team, int(segment.kept));
  const bool shared = segment.pearson && segment.chunks > 1, masked = segment.region.mask != nullptr;
  PassSums sums;
  if (segment.pearson) sums.value[part_pearson] = find_statistics(team, segment, slice, scratch, options);
  find_factors(segment.region, counts, options, scratch.factors);
  if (shared) {
    cluster_sync();  // and no block ends before its part was read
  } else {
    block_sync();
  }
  Gradient gradient;
  if (segment.pearson) gradient.read(scratch.rows + thread_index() / team.size * statistics_per_channel);
  const RegionFactors factors = *scratch.factors;
  for_slice<batch, true>(
      team, segment, slice, false,
      [&](const Piece& p, const Packed<S>& s, const Packed<T>& t, const Vector& m, S* to, bool wide) {
        float g[vector_size];
        float masked_mse_norm = 0, pearson_norm = 0;
        RegionSums<float> squares{0, 0};
        KD_UNROLL for (int i = 0; i < vector_size; ++i) g[i] = 0;
        if (segment.pearson) {
          KD_UNROLL for (int i = 0; i < vector_size; ++i) g[i] = gradient(s[i], t[i]);
          if (!p.whole()) {
            KD_UNROLL for (int i = 0; i < vector_size; ++i) g[i] = i >= p.begin && i < p.end ? g[i] : 0.0f;
          }
          KD_UNROLL for (int i = 0; i < vector_size; ++i) pearson_norm += g[i] * g[i];
        }
        if (masked) {
          KD_UNROLL for (int i = 0; i < vector_size; ++i) {
            g[i] += PassSums::masked_mse(squares, masked_mse_norm, s[i], t[i], m.x[i], factors);
          }
        }
        sums.add(squares, masked_mse_norm, pearson_norm);
        if (!segment.grad.data) return;
        Packed<S> packed;
        KD_UNROLL for (int i = 0; i < vector_size; i += 2) packed.set(i, g[i], g[i + 1]);
        store_packed(packed, to, segment.grad.stride[3], p, wide);
      });
  sums.leave(scratch.warps, parts);
}

KD_NAMESPACE_END
