// A table of segments, one per level of a pyramid, which travels by value: all levels are one launch.
#pragma once

#include "feature_plan.h"
#include "pairs.cuh"

KD_NAMESPACE_BEGIN

using plan::max_segments;

// Segment: what a kernel knows of a level. It has first_block, its first block of the launch, and blocks().
template <class Segment>
struct SegmentTable {
  int count;
  int64_t blocks;
  Segment segment[max_segments];
};

// The segment of a block: this one.
template <class Segment>
KD_DEVICE const Segment& find_segment(const SegmentTable<Segment>& table, int64_t block = block_index()) {
  int index = 0;
  while (index + 1 < table.count && table.segment[index + 1].first_block <= block) ++index;
  return table.segment[index];
}

// Host: calls body(S(), T(), table) until each level whose plan(level, index) has blocks was in a table. Levels of one
// table have the same element types.
template <class Segment, class P, class F>
const char* for_each_table(const FeatureLevel* levels, int count, const P& plan, const F& body) {
  const Dtype types[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  for (const Dtype student : types) {
    for (const Dtype teacher : types) {
      int next = 0;
      while (next < count) {
        SegmentTable<Segment> table{};
        for (; next < count && table.count < max_segments; ++next) {
          const FeatureLevel& level = levels[next];
          if (level.student.dtype != student || level.teacher.dtype != teacher) continue;
          Segment segment = plan(level, next);
          if (segment.blocks() == 0) continue;
          segment.first_block = table.blocks;
          table.blocks += segment.blocks();
          table.segment[table.count++] = segment;
        }
        if (table.count == 0) continue;
        const char* error = with_types(student, teacher, [&](auto s, auto t) { return body(s, t, table); });
        if (error) return error;
      }
    }
  }
  return nullptr;
}

KD_NAMESPACE_END
