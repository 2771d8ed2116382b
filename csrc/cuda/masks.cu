// Masks from boxes on the GPU: one launch for all pictures and up to twelve levels (masks.cuh: what a block does).
#include "masks.cuh"

KD_NAMESPACE_BEGIN

namespace {

template <bool gaussian>
KD_GLOBAL(mask_threads, 4)
draw_boxes(const DrawTable table, float* counts) {
  block_of_mask<gaussian>(block_index(), table, counts);
}

}  // namespace

const char* launch_draw(const DrawTable& table, bool gaussian, float* counts, void* stream) {
  const Launch how{table.levels.blocks, mask_threads, BoxList::bytes(gaussian), stream};
  return gaussian ? launch(draw_boxes<true>, how, table, counts) : launch(draw_boxes<false>, how, table, counts);
}

const char* draw_masks(const MaskDrawing& drawing, bool gaussian, void* stream) {
  const MaskGeometry& geometry = drawing.geometry;
  int next = 0;
  while (next < geometry.levels) {
    DrawTable table{};
    table.boxes = drawing.boxes;
    table.count = drawing.count;
    table.pictures = int(geometry.pictures);
    for (; next < geometry.levels && table.levels.count < max_segments; ++next) {
      MaskSegment s = mask_segment(geometry, next, drawing.masks[next]);
      const int64_t blocks = geometry.pictures * s.tiles;
      if (blocks == 0) continue;
      s.first_block = table.levels.blocks;
      table.levels.blocks += blocks;
      table.levels.segment[table.levels.count++] = s;
    }
    if (const char* error = launch_draw(table, gaussian, nullptr, stream)) return error;
  }
  return nullptr;
}

KD_NAMESPACE_END
