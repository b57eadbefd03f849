#!/usr/bin/env bash
# Everything the project says about GPUs, in one run on a machine that has one: build from source with that machine's
# nvcc, run the tests marked `gpu`, measure, write JSON and a table.
#
#     bash benchmarks/gpu.sh [OUTPUT_FOLDER]      (default: benchmarks/results/gpu)
#
# REPRODUCE=SECONDS adds the deep linear networks of all six classes, smallest first, for as long as that.
# Uses the Python environment it is started in (PYTHON=…): torch with CUDA, pybind11, ninja, setuptools, pytest, and
# what the package itself needs. Nothing is fetched and nothing is installed into that environment. devinterp's rows
# appear if devinterp 1.3.2 is there. A stage that fails does not stop the next; the exit status tells.
set -uo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$repo/benchmarks/results/gpu}"
out=$(cd "${1:-$repo/benchmarks/results/gpu}" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
failed=()

stage() {
    local name=$1
    shift
    printf '\n==> %s\n' "$name"
    "$@" 2>&1 | tee "$out/$name.log" || failed+=("$name")
}

cd "$repo" || exit 1
LLC_FAST_CUDA=1 stage build "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index \
    --target "$site" .
export PYTHONPATH=$site:$repo/tests
cd "$site" || exit 1 # the checkout's own llc_fast has no native module

stage info "$python" -m llc_fast.cli info
stage tests "$python" -m pytest -q -m gpu --rootdir "$repo" -c "$repo/pyproject.toml" "$repo/tests" \
    -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        stage "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -m gpu \
            --rootdir "$repo" -c "$repo/pyproject.toml" "$repo/tests/test_update.py" -k "gpu_equals_cpu or low_precision" \
            -p no:cacheprovider
    done
fi
# Hours at full length: what is done in $REPRODUCE seconds is kept in $out, and the same command goes on with it.
if [[ -n ${REPRODUCE:-} ]]; then
    stage dln-scaling bash -c 'timeout --signal=INT "$0" "$@"; (($? == 0 || $? == 124))' "$REPRODUCE" \
        "$python" -m llc_fast.cli reproduce dln-scaling --scale paper --device cuda --output "$out/dln-scaling"
fi
stage step "$python" "$repo/benchmarks/bench_step.py" --device cuda --repeats 20 --json "$out/step.json"
stage samplers "$python" "$repo/benchmarks/bench_samplers.py" --device cuda --repeats 20 --json "$out/samplers.json"
stage estimate "$python" "$repo/benchmarks/bench_estimate.py" --scaling --device cuda --growing chains parameters \
    --strategies default sequential compiled --json "$out/estimate.json"

if ((${#failed[@]})); then
    printf '\nFAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nAll stages passed; results in %s\n' "$out"
