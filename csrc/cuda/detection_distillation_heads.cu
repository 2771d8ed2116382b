// The objective's heads in one launch: some blocks take the rows of a logits' loss, others boxes, others count the
// masks, or draw and count them, and each does what it would do in a launch of its own. Heads are small, so that their
// launches, not their bytes, are what they cost. A head takes launches of its own, and its sums join the others' all
// the same, where
//
// - a row needs more than one block (rows.cuh: clusters, parts),
// - its rows are so many that blocks of a launch before should count them (row_counts.cuh),
// - the gate of boxes is over the batch,
// - its dtypes are not those of the others, or float16, or its place in the launch is taken.
#include "detection_distillation_heads.cuh"

#include "binary_kl.cuh"
#include "bounded_regression.cuh"
#include "kl_rows.cuh"
#include "soft_cross_entropy.cuh"

KD_NAMESPACE_BEGIN

namespace {

static_assert(plan::count_threads == row_threads, "blocks of all kinds share a launch");

// No blocks: not in the launch.
template <class L>
struct RowsOfHead {
  using Loss = L;
  RowPlan plan;
  Loss loss;
  RowView student, teacher, grad;
  float* sums;
};
struct BoxesOfHead {
  BoxInputs in;
  BoxOptions options;
  RowView grad;
  bool grad_vectors;
  float* sums;
};
constexpr int most_kl = 2;  // decoupled and of one temperature

struct HeadsTable {
  RowsOfHead<KlLoss<true>> kl[most_kl];
  RowsOfHead<SoftLoss<true>> soft;
  RowsOfHead<BinaryLoss<true>> binary;
  BoxesOfHead boxes;
  MaskTable masks;
  float* counts;
};
static_assert(sizeof(HeadsTable) <= 4096, "what every driver takes as a kernel's arguments");

template <class S, class T, class Head>
KD_DEVICE void block_of_rows(int64_t block, const Head& head) {
  using Loss = typename Head::Loss;
  const RowResults results{false, head.sums, nullptr};
  if (head.plan.staged) {
    block_of_rows_staged<Loss, S, T>(block, head.plan, head.loss, head.student, head.teacher, head.grad, results);
  } else {
    block_of_rows_in_place<Loss, S, T>(block, head.plan, head.loss, head.student, head.teacher, head.grad, Pass::whole,
                                       results);
  }
}

KD_DEVICE void block_of_masks(int64_t block, const MaskTable& table, float* counts) {
  if (table.draws) return block_of_mask<false>(block, table.drawn, counts);
  block_of_counts(block, table.counted, counts);
}

// Two blocks on a processor: all of a kind's registers are all kinds'.
template <class S, class T>
KD_GLOBAL(row_threads, 2)
detection_distillation_heads(const HeadsTable table) {
  int64_t block = block_index();
  const int second = block >= table.kl[0].plan.groups ? 1 : 0;
  if (second) block -= table.kl[0].plan.groups;
  if (block < table.kl[second].plan.groups) return block_of_rows<S, T>(block, table.kl[second]);
  block -= table.kl[second].plan.groups;
  if (block < table.soft.plan.groups) return block_of_rows<S, T>(block, table.soft);
  block -= table.soft.plan.groups;
  if (block < table.binary.plan.groups) return block_of_rows<S, T>(block, table.binary);
  block -= table.binary.plan.groups;
  if (block < table.boxes.in.blocks) {
    return block_of_boxes<S, T, S>(block, table.boxes.in, table.boxes.options, table.boxes.sums, table.boxes.grad,
                                   table.boxes.grad_vectors);
  }
  block_of_masks(block - table.boxes.in.blocks, table.masks, table.counts);
}

// The host's side: which heads share the launch, and what it looks like.
class SharedLaunch {
 public:
  // Whether the head has its place in the launch now. Its sums will be at `workspace`.
  bool take(const Head& head, float* workspace, RowSums* sums) {
    const RowPair& pair = head.pair;
    if (!pair_served(pair.student.dtype, pair.teacher.dtype) || pair.columns > most_columns) return false;
    if (pair.student.dtype == Dtype::float16) return false;
    if (heads_ && (pair.student.dtype != student_ || pair.teacher.dtype != teacher_)) return false;
    if (!place(head, workspace, sums)) return false;
    student_ = pair.student.dtype;
    teacher_ = pair.teacher.dtype;
    blocks_ += sums->blocks;
    ++heads_;
    return true;
  }

  bool any() const { return heads_ > 0; }

  const char* run(const MaskTable& masks, float* counts, void* stream) {
    table_.masks = masks;
    table_.counts = counts;
    if (masks.blocks()) needs(masks.shared_bytes());
    const Launch how{blocks_ + masks.blocks(), row_threads, shared_bytes_, stream};
    if (student_ == Dtype::float32) return launch(detection_distillation_heads<float, float>, how, table_);
    if (teacher_ == Dtype::bfloat16) return launch(detection_distillation_heads<BFloat16, BFloat16>, how, table_);
    return launch(detection_distillation_heads<BFloat16, float>, how, table_);
  }

 private:
  HeadsTable table_{};
  Dtype student_ = Dtype::float32, teacher_ = Dtype::float32;
  int heads_ = 0, kl_ = 0;
  bool soft_ = false, binary_ = false, boxes_ = false;
  int64_t blocks_ = 0;
  int shared_bytes_ = 0;

  void needs(int bytes) { shared_bytes_ = bytes > shared_bytes_ ? bytes : shared_bytes_; }

  bool place(const Head& head, float* workspace, RowSums* sums) {
    const RowPair& pair = head.pair;
    if (head.kind == Head::boxes) {
      if (boxes_ || head.boxes_options.gate == int(Gate::batch)) return false;
      boxes_ = true;
      table_.boxes = BoxesOfHead{box_inputs(pair, head.target, row_threads),
                                 box_options(pair, head.boxes_options, head.loss_weight, nullptr), pair.grad,
                                 takes_vectors(pair.grad), workspace};
      *sums = RowSums{workspace, table_.boxes.in.blocks, 1};
      needs(box_scratch_bytes(row_threads));
      return true;
    }
    const RowPlan plan = plan_rows(pair, rows_capability());
    if (plan.cluster > 1 || plan.parts > 1) return false;
    switch (head.kind) {
      case Head::kl:
        if (kl_ == most_kl || kl_counters(plan, pair, head.kl_regions)) return false;
        put(table_.kl[kl_++], plan, pair,
            kl_loss<true>(plan, pair, head.kl_regions, head.loss_weight, nullptr, nullptr), workspace, sums);
        return true;
      case Head::soft_cross_entropy:
        if (soft_ || soft_counters(plan, pair, head.soft)) return false;
        soft_ = true;
        put(table_.soft, plan, pair, soft_loss<true>(plan, pair, head.soft, head.loss_weight, nullptr, nullptr),
            workspace, sums);
        return true;
      default:
        if (binary_) return false;
        binary_ = true;
        put(table_.binary, plan, pair,
            binary_loss<true>(pair, head.temperature, head.reduction, head.loss_weight, nullptr), workspace, sums);
        return true;
    }
  }

  template <class Rows>
  void put(Rows& to, const RowPlan& plan, const RowPair& pair, const typename Rows::Loss& loss, float* workspace,
           RowSums* sums) {
    to = Rows{plan, loss, pair.student, pair.teacher, pair.grad, workspace};
    *sums = RowSums{workspace, plan.groups, Rows::Loss::parts};
    needs(plan.shared_bytes);
  }
};

// At least what its launches need, its own or the shared one.
int64_t workspace_of(const Head& head) {
  switch (head.kind) {
    case Head::kl:
      return kl_rows_workspace(head.pair, head.kl_regions);
    case Head::soft_cross_entropy:
      return soft_cross_entropy_workspace(head.pair, head.soft);
    case Head::binary_kl:
      return binary_kl_workspace(head.pair);
    default:
      return bounded_regression_workspace(head.pair.rows);
  }
}

const char* launch_alone(const Head& head, float* workspace, RowSums* sums, void* stream) {
  switch (head.kind) {
    case Head::kl:
      return kl_rows_sums(head.pair, head.kl_regions, head.loss_weight, workspace, sums, stream);
    case Head::soft_cross_entropy:
      return soft_cross_entropy_sums(head.pair, head.soft, head.loss_weight, workspace, sums, stream);
    case Head::binary_kl:
      return binary_kl_sums(head.pair, head.temperature, head.reduction, head.loss_weight, workspace, sums, stream);
    default:
      return bounded_regression_sums(head.pair, head.target, head.boxes_options, head.loss_weight, workspace, sums,
                                     stream);
  }
}

}  // namespace

int64_t heads_workspace(const Head* heads, int count) {
  int64_t floats = 0;
  for (int i = 0; i < count; ++i) floats += workspace_of(heads[i]);
  return floats;
}

const char* launch_heads(const Head* heads, int count, const MaskTable& masks, float* counts, float* workspace,
                         RowSums* sums, bool* counted, void* stream) {
  SharedLaunch shared;
  for (int i = 0; i < count; ++i) {
    if (!shared.take(heads[i], workspace, &sums[i])) {
      if (const char* error = launch_alone(heads[i], workspace, &sums[i], stream)) return error;
    }
    workspace += workspace_of(heads[i]);
  }
  *counted = shared.any();
  return shared.any() ? shared.run(masks, counts, stream) : nullptr;
}

KD_NAMESPACE_END
