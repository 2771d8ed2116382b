#!/usr/bin/env bash
# Everything that only a GPU can show, in stages of under ten minutes each, from a checkout and with nothing fetched:
#
#   benchmarks/gpu_check.sh RESULTS [stage ...]      stages: build grid gpu sanitize bench   (default: all)
#
# RESULTS receives a log per stage, the benchmarks' CSV, and a mark for each stage that passed, of bench for each loss and
# dtype, too; a second run with the same folder leaves out what is marked. Written for Python 3.12, torch 2.11, Triton 3.6 and nvcc 13.0 on an H200;
# needs pytest and hypothesis beside them. KDKERNELS_GPU_CHECK_SECONDS bounds each stage (default 570).
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:?usage: benchmarks/gpu_check.sh RESULTS [stage ...]}
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build grid gpu sanitize bench)
mkdir -p "$results"
results=$(cd "$results" && pwd)
export KDKERNELS_CACHE_DIR=${KDKERNELS_CACHE_DIR:-$results/cache} KDKERNELS_REQUIRE_GPU=1 PYTHONPATH=$PWD PYTHONUNBUFFERED=1
seconds=${KDKERNELS_GPU_CHECK_SECONDS:-570}
python=${PYTHON:-python3}
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 4)

build() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv
  "$python" -m kdkernels info --build
}
# The losses' grid of tests: on a GPU the fixture `backend` runs CUDA and Triton for real.
grid() {
  "$python" -m pytest -q "${parallel[@]}" -m 'not slow' -k 'cuda or triton' tests/test_golden.py tests/test_hard_inputs.py \
    tests/test_masked_mse.py tests/test_pearson.py tests/test_temperature_kl.py tests/test_decoupled_kl.py \
    tests/test_soft_cross_entropy.py tests/test_binary_kl.py tests/test_bounded_regression.py tests/test_masks*.py tests/test_one_pass_rows.py tests/test_one_pass_cuda.py \
    tests/test_detection_distillation.py
}
gpu() { "$python" -m pytest -q -s tests/test_gpu.py; }
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed here: left out"
    return 0
  fi
  local some='small or labels_out_of_range'
  compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -x tests/test_gpu.py -k "($some) and cuda" &&
    compute-sanitizer --tool racecheck --error-exitcode 9 "$python" -m pytest -q -x tests/test_gpu.py -k "ten_runs and small and cuda"
}
# A run and a mark for each loss and dtype, so that what one call has no time for the next one does.
bench() {
  local status=0 left loss dtype all
  all=$("$python" -c "import sys; sys.path.insert(0, 'benchmarks'); import run
print(*(f'{b.loss} {d}' for b in run.benchmarks() for d in ('float32', 'bfloat16') if d in b.dtypes), sep='\n')") || return 1
  while read -r loss dtype; do
    [ -e "$results/bench.$loss.$dtype.passed" ] && continue
    left=$((seconds - 60 - SECONDS))
    [ $left -gt 0 ] || { echo "no time left: $loss $dtype is for another call"; status=1; continue; }
    "$python" benchmarks/run.py "$loss" --dtype "$dtype" --device cuda --skip-tests --seconds 1 --csv "$results/gpu.csv" \
      --budget $left </dev/null && touch "$results/bench.$loss.$dtype.passed" || status=1
  done <<<"$all"
  return $status
}

status=0
for stage in "${stages[@]}"; do
  if [ -e "$results/$stage.passed" ]; then
    echo "== $stage: passed before"
    continue
  fi
  echo "== $stage"
  export -f "${stage?}"
  export python seconds results
  declare -p parallel >"$results/.environment"
  if timeout "$seconds" bash -c "set -uo pipefail; source '$results/.environment'; $stage" 2>&1 | tee "$results/$stage.log"; then
    touch "$results/$stage.passed"
  else
    echo "== $stage: FAILED (see $results/$stage.log)"
    status=1
  fi
done
exit $status
