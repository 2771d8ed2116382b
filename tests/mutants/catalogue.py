"""The mutants: each one edit of csrc/, for one loss whose tests must notice it.

`before` occurs exactly once in `file`. `equivalent` explains why no test can notice; empty for all others. A kernel
that changes usually moves its mutants with it: run.py says which text it no longer finds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`after` in place of `before` in csrc/`file`, judged by the tests of `loss`."""

    name: str
    file: str
    loss: str
    before: str
    after: str
    equivalent: str = ""


_MSE, _FEATURE, _REDUCE, _PRIMITIVES = (
    "cuda/masked_mse.cu",
    "cuda/feature.cuh",
    "cuda/reduce.cuh",
    "cuda/primitives.cuh",
)

MUTANTS = [
    Mutant(
        "mask read before it is complete",
        _MSE,
        "masked_mse",
        "values[at(i - tile.begin)] = mask[i];\n    block_sync();",
        "values[at(i - tile.begin)] = mask[i];",
    ),
    Mutant(
        "sums overwrite a mask that others still read",
        _MSE,
        "masked_mse",
        "  block_sync();  // the mask has been read: its memory serves the sums\n",
        "",
    ),
    Mutant("mask of the first picture for all", _MSE, "masked_mse", "s.mask + tile.outer * s.length", "s.mask"),
    Mutant(
        "mask shifted by one pixel",
        _MSE,
        "masked_mse",
        "mask(p.first + i - tile.begin)",
        "mask(p.first + i - tile.begin + 1)",
    ),
    Mutant("pixels counted by every group", _MSE, "masked_mse", "} else if (tile.first_line == 0) {", "} else {"),
    Mutant("pixels counted by every tile of channels", _MSE, "masked_mse", "if (tile.begin > 0) return;", ""),
    Mutant(
        "background counted as foreground",
        _MSE,
        "masked_mse",
        "sums[mask_outside] += 1.0f - mask(i);",
        "sums[mask_outside] += mask(i);",
    ),
    Mutant(
        "regions swapped in the partial sums",
        _MSE,
        "masked_mse",
        "sums[foreground] = squares.foreground;",
        "sums[foreground] = squares.background;",
    ),
    Mutant(
        "gradient without the upstream gradient",
        _MSE,
        "masked_mse",
        "const float upstream = *grad_loss;",
        "const float upstream = 1.0f;",
    ),
    Mutant("gradient scales of another level", _MSE, "masked_mse", "int(level_of[table.segment[i].level])", "0"),
    Mutant("backward scale without its 2", _MSE, "masked_mse", "float(2 * f)", "float(f)"),
    Mutant(
        "finish leaves out the last partial sums",
        _MSE,
        "masked_mse",
        "b < level.blocks; b +=",
        "b < level.blocks - 1; b +=",
    ),
    Mutant(
        "finish adds only half of its threads",
        _MSE,
        "masked_mse",
        "half = finish_threads / 2; half > 0",
        "half = finish_threads / 2; half > 1",
    ),
    Mutant("level share dropped", _MSE, "masked_mse", "table.share = share;", "table.share = 1;"),
    Mutant("second launch forgets the first one's partial sums", _MSE, "masked_mse", "launched += table.blocks;", ""),
    Mutant("levels beyond one finishing table start the loss anew", _MSE, "masked_mse", "    first = false;\n", ""),
    Mutant(
        "next line not advanced within a batch",
        _MSE,
        "masked_mse",
        "const Vector m = mask_of_piece(tile, mask, first + b * segment.line_step, piece[b]);",
        "const Vector m = mask_of_piece(tile, mask, first, piece[b]);",
    ),
    Mutant("idle threads take part", _MSE, "masked_mse", "if (tile.line >= segment.line_step) return;", ""),
    Mutant(
        "head of a line not peeled",
        _FEATURE,
        "masked_mse",
        "p.begin = p.first < tile.begin ? tile.begin - p.first : 0;",
        "p.begin = 0;",
    ),
    Mutant(
        "tail of a line not peeled",
        _FEATURE,
        "masked_mse",
        "p.end = tile.end - p.first < vector_size ? tile.end - p.first : vector_size;",
        "p.end = vector_size;",
    ),
    Mutant(
        "vector wherever the piece is whole",
        _FEATURE,
        "masked_mse",
        "return step == 1 && (reinterpret_cast<uintptr_t>(line) + uintptr_t(int64_t(first) * int64_t(sizeof(S)))) % 16 == 0;",
        "return step == 1;",
    ),
    Mutant("vector whatever the step", _FEATURE, "masked_mse", "return step == 1 && (", "return ("),
    Mutant(
        "last line of a group left out",
        _FEATURE,
        "masked_mse",
        "if (tile.last_line > s.lines) tile.last_line = s.lines;",
        "if (tile.last_line >= s.lines) tile.last_line = s.lines - 1;",
    ),
    Mutant(
        "lines beyond the level", _FEATURE, "masked_mse", "if (tile.last_line > s.lines) tile.last_line = s.lines;", ""
    ),
    Mutant(
        "row of a picture forgotten",
        _FEATURE,
        "masked_mse",
        "data += n * view.stride[0] + y * view.stride[2];",
        "data += n * view.stride[0];",
    ),
    Mutant(
        "rows merged whenever the student's are",
        _FEATURE,
        "masked_mse",
        "merges(level.student) && merges(level.teacher) && merges(level.grad)",
        "merges(level.student)",
    ),
    Mutant(
        "block searched one segment short",
        _FEATURE,
        "masked_mse",
        "table.segment[index + 1].first_block <= block_index()",
        "table.segment[index + 1].first_block < block_index()",
    ),
    Mutant(
        "step of the student for all", _FEATURE, "masked_mse", "step = view.stride[3];", "step = s.student.stride[3];"
    ),
    Mutant(
        "half a warp summed",
        _REDUCE,
        "masked_mse",
        "bits = warp_size / 2; bits > 0; bits /= 2",
        "bits = warp_size / 4; bits > 0; bits /= 2",
    ),
    Mutant(
        "one warp left out of a block's sum",
        _REDUCE,
        "masked_mse",
        "for (int i = 0; i < warps; ++i) total",
        "for (int i = 1; i < warps; ++i) total",
    ),
    Mutant(
        "no barrier before the last sum",
        _REDUCE,
        "masked_mse",
        "  block_sync();\n  if (thread_index() == 0) {",
        "  if (thread_index() == 0) {",
    ),
    Mutant(
        "halves of a word swapped when stored",
        _PRIMITIVES,
        "masked_mse",
        "pack<T>(v.x[2 * i], v.x[2 * i + 1])",
        "pack<T>(v.x[2 * i + 1], v.x[2 * i])",
    ),
    Mutant(
        "second half of a float32 vector not stored",
        _PRIMITIVES,
        "masked_mse",
        "  store16(p, a);\n  store16(p + 4, b);",
        "  store16(p, a);",
    ),
]
