// The scheduler of emulator.h: fibers, barriers, shuffles.
#include "emulator.h"

#include <stdarg.h>
#include <sys/mman.h>

#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {
namespace {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 256 * 1024;

enum class Waits { nothing, warp, block, cluster, ended };

struct Block;

struct Fiber {
  Block* block = nullptr;
  int index = 0;
  Waits waits = Waits::nothing;
  uint32_t sent = 0, received = 0;
  int bits = 0;
  char* stack = nullptr;
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
};

struct Block {
  int64_t index = 0;
  int rank = 0;
  void* shared = nullptr;
};

struct State {
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<char*> stacks;
  int threads = 0, cluster = 1, shared_bytes = 0;
  Fiber* current = nullptr;
  Body body = nullptr;
  void* context = nullptr;
  char error[256] = "";
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
} state;

uint64_t seed = 0;
int capability = 90, code = 0;
int64_t launches = 0;

uint64_t random_word() {
  seed += 0x9e3779b97f4a7c15u;
  uint64_t z = seed;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Saves the callee's registers and stack of the running side, and goes on with the other's. ucontext would make a
// system call for each switch.
#if defined(__x86_64__)
extern "C" void kdkernels_switch(void** save, void* load);
asm(R"(
.text
.globl kdkernels_switch
.hidden kdkernels_switch
.type kdkernels_switch, @function
kdkernels_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kdkernels_switch, .-kdkernels_switch
)");
void to_scheduler() { kdkernels_switch(&state.current->pointer, state.scheduler); }
void to_fiber(Fiber& fiber) { kdkernels_switch(&state.scheduler, fiber.pointer); }
#else
void to_scheduler() { swapcontext(&state.current->context, &state.scheduler); }
void to_fiber(Fiber& fiber) { swapcontext(&state.scheduler, &fiber.context); }
#endif

void start_of_fiber() {
  state.body(state.context);
  state.current->waits = Waits::ended;
  to_scheduler();
  abort();  // an ended fiber is never resumed
}

void prepare(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, stack_bytes);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes);
  *--top = nullptr;  // keeps the stack aligned as at a call
  *--top = reinterpret_cast<void*>(&start_of_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &start_of_fiber, 0);
#endif
}

void wait(Waits what) {
  state.current->waits = what;
  to_scheduler();
}

const char* name(Waits waits) {
  switch (waits) {
    case Waits::warp:
      return "a shuffle";
    case Waits::block:
      return "block_sync";
    case Waits::cluster:
      return "cluster_sync";
    case Waits::ended:
      return "its end";
    default:
      return "nothing";
  }
}

// Releases the fibers [begin, end) if all of them wait for `what`. True if it did.
bool release(int begin, int end, Waits what) {
  for (int i = begin; i < end; ++i) {
    if (state.fibers[i].waits != what) return false;
  }
  for (int i = begin; i < end; ++i) {
    Fiber& fiber = state.fibers[i];
    if (what == Waits::warp) {
      const int source = begin + (fiber.index % warp_size ^ fiber.bits);
      if (fiber.bits < 0 || fiber.bits >= warp_size || state.fibers[source].bits != fiber.bits) {
        snprintf(state.error, sizeof state.error, "block %lld, thread %d: lanes of one warp shuffle differently",
                 static_cast<long long>(fiber.block->index), fiber.index);
        return true;
      }
      fiber.received = state.fibers[source].sent;
    }
    fiber.waits = Waits::nothing;
  }
  return true;
}

bool release_waiting() {
  bool released = false;
  const int count = int(state.fibers.size());
  for (int i = 0; i < count; i += warp_size) released |= release(i, i + warp_size, Waits::warp);
  for (int i = 0; i < count; i += state.threads) released |= release(i, i + state.threads, Waits::block);
  return release(0, count, Waits::cluster) || released;
}

// Runs a fiber until it waits or ends. False if the launch failed.
bool resume(Fiber& fiber) {
  state.current = &fiber;
  to_fiber(fiber);
  return !state.error[0];
}

// A block that has ended has no shared memory: who still reads it shall notice.
void forget_ended_blocks() {
  const int threads = state.threads;
  for (size_t b = 0; b < state.blocks.size(); ++b) {
    bool ended = true;
    for (int i = 0; i < threads; ++i)
      ended = ended && state.fibers[b * size_t(threads) + size_t(i)].waits == Waits::ended;
    if (ended) memset(state.blocks[b].shared, 0xff, size_t(state.shared_bytes));
  }
}

// Every fiber in turn, a step each: warps advance together. With a seed, warps in a random order, each as far as it
// can go alone: what a barrier should have held back happens.
bool run_fibers(const std::vector<int>& order) {
  bool ran = false;
  for (size_t at = 0; at < order.size(); at += seed ? warp_size : 1) {
    const int first = order[at] / warp_size * warp_size;
    for (bool again = true; again;) {
      for (size_t i = 0; i < (seed ? size_t(warp_size) : 1); ++i) {
        Fiber& fiber = state.fibers[size_t(order[at + i])];
        if (fiber.waits != Waits::nothing) continue;
        if (!resume(fiber)) return true;
        ran = true;
      }
      again = seed && release(first, first + warp_size, Waits::warp) && !state.error[0];
    }
    if (seed && state.cluster > 1) forget_ended_blocks();
  }
  return ran;
}

// A permutation of the warps, and of the lanes of each.
void shuffle(std::vector<int>& order, int count) {
  order.resize(size_t(count));
  for (int i = 0; i < count; ++i) order[size_t(i)] = i;
  if (!seed) return;
  for (int w = count / warp_size - 1; w > 0; --w) {
    const int other = int(random_word() % uint64_t(w + 1));
    for (int i = 0; i < warp_size; ++i)
      std::swap(order[size_t(w * warp_size + i)], order[size_t(other * warp_size + i)]);
  }
  for (int w = 0; w < count; w += warp_size) {
    for (int i = warp_size - 1; i > 0; --i) {
      std::swap(order[size_t(w + i)], order[size_t(w) + size_t(random_word() % uint64_t(i + 1))]);
    }
  }
}

void run_cluster() {
  const int count = int(state.fibers.size());
  static std::vector<int> order;
  shuffle(order, count);
  for (;;) {
    const bool ran = run_fibers(order);
    if (state.error[0]) return;
    int ended = 0;
    for (const Fiber& fiber : state.fibers) ended += fiber.waits == Waits::ended;
    if (ended == count) return;
    if (release_waiting() || ran) {
      if (state.error[0]) return;
      continue;
    }
    for (const Fiber& fiber : state.fibers) {
      if (fiber.waits == Waits::ended || fiber.waits == state.fibers[0].waits) continue;
      snprintf(state.error, sizeof state.error,
               "barrier divergence: block %lld, thread %d waits at %s while block %lld, thread 0 is at %s",
               static_cast<long long>(fiber.block->index), fiber.index, name(fiber.waits),
               static_cast<long long>(state.fibers[0].block->index), name(state.fibers[0].waits));
      return;
    }
    snprintf(state.error, sizeof state.error, "barrier divergence: some threads ended, others wait at %s",
             name(state.fibers[0].waits));
    return;
  }
}

}  // namespace

int thread_index() { return state.current->index; }
int block_threads() { return state.threads; }
int64_t block_index() { return state.current->block->index; }
// Code for an architecture without clusters does not know that it runs in one.
bool knows_clusters() { return code_capability() >= 90; }
int cluster_rank() { return knows_clusters() ? state.current->block->rank : 0; }
int cluster_blocks() { return knows_clusters() ? state.cluster : 1; }
void* shared_memory() { return state.current->block->shared; }

void* peer_shared(void* own, int rank) {
  if (!knows_clusters()) return own;
  if (rank < 0 || rank >= state.cluster) fail("no block of rank %d in a cluster of %d", rank, state.cluster);
  const ptrdiff_t offset = static_cast<char*>(own) - static_cast<char*>(state.current->block->shared);
  if (offset < 0 || offset >= state.shared_bytes) fail("peer_shared of an address outside shared memory");
  return static_cast<char*>(state.blocks[size_t(rank)].shared) + offset;
}

void block_sync() { wait(Waits::block); }
void cluster_sync() { wait(knows_clusters() ? Waits::cluster : Waits::block); }

uint32_t shuffle_xor(uint32_t word, int bits) {
  state.current->sent = word;
  state.current->bits = bits;
  wait(Waits::warp);
  return state.current->received;
}

void set_seed(uint64_t value) { seed = value; }
void set_compute_capability(int value) { capability = value; }
int compute_capability() { return capability; }
int64_t launch_count() { return launches; }
void set_code_capability(int value) { code = value; }
int code_capability() { return code && code < capability ? code : capability; }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int used =
      snprintf(state.error, sizeof state.error,
               "block %lld, thread %d: ", static_cast<long long>(state.current->block->index), state.current->index);
  vsnprintf(state.error + used, sizeof state.error - size_t(used), format, arguments);
  va_end(arguments);
  to_scheduler();
  abort();
}

// Bytes of shared memory that a block can have.
int most_shared_bytes() {
  if (capability < 80) return 64 * 1024;
  if (capability < 90) return (capability == 80 || capability == 87 ? 163 : 99) * 1024;
  return (capability / 10 == 12 ? 99 : 227) * 1024;
}

const char* run_body(int64_t blocks, int threads, int shared_bytes, int cluster, Body body, void* context) {
  state.error[0] = 0;
  if (threads % warp_size || threads < 1 || threads > 1024) return "threads: not a multiple of 32 up to 1024";
  if (cluster < 1 || blocks % cluster) return "blocks: not a multiple of the cluster";
  if (cluster > 1 && capability < 90) return "clusters need compute capability 9.0";
  if (cluster > 8) return "a cluster that not every device has";
  if (shared_bytes > most_shared_bytes()) return "more shared memory than a block can have";
  ++launches;
  state.threads = threads;
  state.cluster = cluster;
  state.shared_bytes = shared_bytes;
  state.body = body;
  state.context = context;
  state.fibers.assign(size_t(threads) * size_t(cluster), Fiber());
  state.blocks.assign(size_t(cluster), Block());
  while (state.stacks.size() < state.fibers.size()) {
    void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) return "no memory for a fiber's stack";
    state.stacks.push_back(static_cast<char*>(stack));
  }
  for (int64_t first = 0; first < blocks && !state.error[0]; first += cluster) {
    for (int rank = 0; rank < cluster; ++rank) {
      Block& block = state.blocks[size_t(rank)];
      block.index = first + rank;
      block.rank = rank;
      if (!block.shared) block.shared = malloc(size_t(shared_bytes));  // exactly, so that one byte more is seen
      memset(block.shared, 0xff, size_t(shared_bytes));                // NaN, whatever type it is read as
    }
    for (size_t i = 0; i < state.fibers.size(); ++i) {
      Fiber& fiber = state.fibers[i];
      fiber.block = &state.blocks[i / size_t(threads)];
      fiber.index = int(i % size_t(threads));
      fiber.waits = Waits::nothing;
      fiber.stack = state.stacks[i];
      prepare(fiber);
    }
    run_cluster();
  }
  for (Block& block : state.blocks) free(block.shared);
  return state.error[0] ? state.error : nullptr;
}

}  // namespace emulator

extern "C" {
__attribute__((visibility("default"))) void kdkernels_emulator_seed(uint64_t seed) { emulator::set_seed(seed); }
__attribute__((visibility("default"))) void kdkernels_emulator_capability(int capability) {
  emulator::set_compute_capability(capability);
}
__attribute__((visibility("default"))) int64_t kdkernels_emulator_launches() { return emulator::launch_count(); }
__attribute__((visibility("default"))) void kdkernels_emulator_code(int capability) {
  emulator::set_code_capability(capability);
}
}
