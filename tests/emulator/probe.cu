// Kernels that misbehave, each in one way, and one that does not: what test_emulator.py holds the emulator to.
#include "../../csrc/cuda/primitives.cuh"
#include "../../csrc/cuda/reduce.cuh"

KD_NAMESPACE_BEGIN

namespace {

KD_GLOBAL(64, 1) missing_barrier(float* out) {
  if (thread_index() != 3) block_sync();
  out[0] = 1;
}

KD_GLOBAL(64, 1) barrier_and_shuffle(float* out) {
  if (thread_index() < 32) {
    out[0] = sum_of_lanes(1.0f);
  } else {
    block_sync();
  }
}

KD_GLOBAL(64, 1) half_a_warp_shuffles(float* out) {
  if (thread_index() % 32 < 16) out[0] = sum_of_lanes(1.0f);
}

KD_GLOBAL(64, 1) lanes_shuffle_differently(float* out) {
  out[thread_index()] = shuffle_xor(1.0f, thread_index() % 2 ? 1 : 2);
}

KD_GLOBAL(64, 1) unwritten_shared_memory(float* out) { out[thread_index()] = shared_memory<float>()[thread_index()]; }

KD_GLOBAL(64, 1) misaligned_load(float* out) { out[0] = load_vector(out + 1).x[0]; }

KD_GLOBAL(64, 1) misaligned_store(float* out) { store_vector(out + 2, Vector{}); }

// Every thread adds itself to a list without any synchronisation: the order in which threads run.
KD_GLOBAL(64, 1) race(float* out) {
  const int place = int(out[0]) + 1;
  out[place] = float(thread_index());
  out[0] = float(place);
}

// Each block tells its rank to its right neighbour, whose memory it reads.
KD_GLOBAL(64, 1) cluster_ring(float* out) {
  float* own = shared_memory<float>();
  own[thread_index()] = float(100 * cluster_rank() + thread_index());
  cluster_sync();
  const int next = (cluster_rank() + 1) % cluster_blocks();
  out[block_index() * block_threads() + thread_index()] = peer_shared(own, next)[thread_index()];
  cluster_sync();
}

KD_GLOBAL(64, 1) block_total(float* out) {
  float values[2] = {float(thread_index()), 1.0f};
  sum_of_block(values, shared_memory<float>());
  if (thread_index() == 0) out[0] = values[0], out[1] = values[1];
}

KD_GLOBAL(64, 1) peer_outside(float* out) { out[0] = *peer_shared(out, 0); }

KD_GLOBAL(64, 1) no_such_peer(float* out) { out[0] = *peer_shared(shared_memory<float>(), 7); }

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* probe(const char* name, float* out, int blocks,
                                                                    int cluster) {
  const Launch how{blocks, 64, 1024, nullptr, cluster};
#define KD_PROBE(kernel) \
  if (strcmp(name, #kernel) == 0) return launch(kernel, how, out);
  KD_PROBE(missing_barrier)
  KD_PROBE(barrier_and_shuffle)
  KD_PROBE(half_a_warp_shuffles)
  KD_PROBE(lanes_shuffle_differently)
  KD_PROBE(unwritten_shared_memory)
  KD_PROBE(misaligned_load)
  KD_PROBE(misaligned_store)
  KD_PROBE(race)
  KD_PROBE(cluster_ring)
  KD_PROBE(block_total)
  KD_PROBE(peer_outside)
  KD_PROBE(no_such_peer)
  return "no such probe";
}

// The 16-bit conversions, for every input.
extern "C" __attribute__((visibility("default"))) float half_as_float(uint16_t bits) { return to_float(Half{bits}); }
extern "C" __attribute__((visibility("default"))) uint16_t float_as_half(float x) { return from_float<Half>(x).bits; }
extern "C" __attribute__((visibility("default"))) uint16_t float_as_bfloat16(float x) {
  return from_float<BFloat16>(x).bits;
}

KD_NAMESPACE_END
