#!/usr/bin/env bash
# Everything the project says about GPUs, on a machine that has one: build from source with that machine's nvcc, run the
# tests marked `gpu`, measure, and hold what was measured against the targets.
#
#     bash benchmarks/gpu/gpu.sh [-o FOLDER] [STAGE …]      (default: benchmarks/results/gpu, and all stages, in this order)
#
#     stage          minutes  at most  what
#     build, info        1        4    always: the package, in a folder of its own
#     tests              2        5    pytest -m gpu
#     memcheck           1.5      4    compute-sanitizer on the kernels
#     racecheck          1.5      4
#     step               1        3    one SGLD step of 10⁸ parameters, against its rivals; one kernel a step
#     samplers           2        5    every sampler's bandwidth: 1 chain, 4 chains, a bfloat16 model
#     ncu                1        4    every step kernel under Nsight Compute
#     chains             1.5      4    1,024 parameters, 4 and 64 chains × 10,000 steps by CUDA graphs
#     memory             1        4    peak memory of estimates of 10⁸ parameters
#     large-tf32         4        8    10⁸ parameters at the paper's setting, 50,000 steps, TF32; and rivals, fewer steps
#     large-float32      7        9    the same in float32, stopped and extrapolated after 350 s
#     dln-scaling        8        9    the six classes of deep linear networks, smallest first, for REPRODUCE=400 seconds
#     scaling            6        9    only by name: how a step's time grows with chains and parameters
#
# The minutes are expected on an H100. Where one command may take ten of them, these calls do everything but dln-scaling:
#
#     bash benchmarks/gpu/gpu.sh -o "$OUT" tests memcheck racecheck step chains
#     bash benchmarks/gpu/gpu.sh -o "$OUT" samplers ncu memory large-tf32
#     bash benchmarks/gpu/gpu.sh -o "$OUT" large-float32
#
# Uses the Python environment it is started in (PYTHON=…): torch with CUDA, pybind11, ninja, setuptools, pytest, and
# what the package itself needs. Nothing is fetched and nothing is installed into that environment. Rows of devinterp
# 1.3.2 and canonical-interp 0.1.5 appear if they are there. A stage that fails or takes too long does not stop the next;
# the exit status tells. FOLDER holds gpu.log, stages.tsv, a JSON file for each stage that measures, report.md (see
# gpu_report.py, which also joins the folders of several calls), and results.tar.gz, all of these in one.
#
# To try the script itself: DEVICE=cpu SMOKE=1 bash benchmarks/gpu/gpu.sh runs every stage on tiny problems without a GPU;
# SITE=FOLDER takes the package from there instead of building it.
set -uo pipefail

all=(tests memcheck racecheck step samplers ncu chains memory large-tf32 large-float32 dln-scaling)
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$repo/benchmarks/results/gpu
if [[ ${1:-} == -o ]]; then
    out=${2:?-o needs a folder}
    shift 2
fi
wanted=("${@:-${all[@]}}")
for name in "${wanted[@]}"; do
    if [[ " ${all[*]} scaling " != *" $name "* ]]; then
        echo "unknown stage '$name'; choose from: ${all[*]} scaling" >&2
        exit 2
    fi
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$(realpath -m "${SITE:-$work/site}")
failed=()

# stage NAME SECONDS COMMAND…: run it for at most so long, note how it ended, and bring the results up to date.
stage() {
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    printf '\n==> %s\n' "$name" | tee -a "$out/gpu.log"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/gpu.log"
    status=${PIPESTATUS[0]}
    ((status == 0)) || failed+=("$name")
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - started))" >>"$out/stages.tsv"
    "$python" "$repo/benchmarks/gpu/gpu_report.py" "$out" >/dev/null
    tar -czf "$work/results.tar.gz" -C "$out" --exclude=results.tar.gz --exclude=work . && mv "$work/results.tar.gz" "$out"
}

# when STAGE SECONDS COMMAND…: the same, if the stage was asked for.
when() {
    [[ " ${wanted[*]} " != *" $1 "* ]] || stage "$@"
}

bench() {
    local name=$1 limit=$2 script=$3
    shift 3
    when "$name" "$limit" "$python" "$repo/benchmarks/$script.py" --device "$device" --json "$out/$name.json" "$@"
}

cd "$repo" || exit 1
if [[ -z ${SITE:-} ]]; then
    LLC_FAST_CUDA=$([[ $device == cuda ]] && echo 1 || echo 0) stage build 240 "$python" -m pip install --quiet \
        --no-deps --no-build-isolation --no-index --target "$site" .
fi
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' "$repo/tests")
export PYTHONPATH=$site:$repo/tests PYTHONUNBUFFERED=1
cd "$work" || exit 1 # the checkout's own llc_fast has no native module
stage info 60 "$python" -m llc_fast.cli info

pytest=("$python" -m pytest -q -m gpu --rootdir "$repo" -c "$repo/pyproject.toml" -p no:cacheprovider)
when tests 300 "${pytest[@]}" "${gpu_tests[@]}"

# Errors of CUDA's functions are left out: torch asks for functions that a driver may lack. Without torch's cache every
# tensor is an allocation of its own, so that memcheck sees where it ends.
kernels=(-k "gpu_equals_cpu or gpu_noise or low_precision")
sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9)
when memcheck 240 "${sanitizer[@]}" --tool memcheck --report-api-errors no "${pytest[@]}" "${gpu_tests[@]}" "${kernels[@]}"
when racecheck 240 "${sanitizer[@]}" --tool racecheck "${pytest[@]}" "${gpu_tests[@]}" "${kernels[@]}"

network=$repo/build/dln-100M-342.pt # ignored by git; the next call on the same machine finds it
if [[ -z ${SMOKE:-} ]]; then
    step=(--repeats 20) samplers=(--repeats 20) once=() chains=(--steps 10000 --rival-steps 1000) memory=()
    scaling=() large=(--network "$network") short=(--short 200) reproduce=${REPRODUCE:-400}
else
    step=(--repeats 1 --parameters 100000) samplers=(--repeats 1 --quick) once=(--quick) memory=(--width 20 --layers 3)
    chains=(--steps 20 --rival-steps 40) scaling=(--budget 0.05) short=(--short 10)
    large=(--size 1k --seed 0 --steps 40 --network "$work/network.pt") reproduce=${REPRODUCE:-10}
fi
mkdir -p "$(dirname "$network")"

bench step 180 speed/bench_step "${step[@]}"
bench samplers 300 speed/bench_samplers "${samplers[@]}"

sections=()
for section in SpeedOfLight MemoryWorkloadAnalysis WarpStateStats LaunchStats Occupancy; do
    sections+=(--section "$section")
done
once=("$python" "$repo/benchmarks/speed/bench_samplers.py" --device "$device" --once --layouts 1 "${once[@]}")
# shellcheck disable=SC2016
when ncu 240 bash -c 'ncu --profile-from-start off --clock-control none --kernel-name "regex:step_kernel|add_tiles" \
    --export "$0/steps" "${@:2}" && ncu --import "$0/steps.ncu-rep" --csv --page details >"$1/ncu.csv" &&
    ncu --import "$0/steps.ncu-rep" --page details --print-details all' "$work" "$out" "${sections[@]}" "${once[@]}"

bench chains 240 speed/bench_estimate --sizes 1024 --chains 4 64 --per-step "${chains[@]}" \
    --contenders llc_fast devinterp canonical
bench memory 240 speed/bench_memory "${memory[@]}"
bench large-tf32 480 gpu/bench_large "${large[@]}" "${short[@]}" --contenders llc_fast:tf32 llc_fast:tf32:kept \
    llc_fast:tf32:cuda-graph devinterp:tf32
bench large-float32 540 gpu/bench_large "${large[@]}" --seconds 350 --contenders llc_fast:float32
# What is done is kept in FOLDER/dln-scaling, and the same command goes on with it.
# shellcheck disable=SC2016
when dln-scaling $((reproduce + 100)) bash -c 'timeout --foreground --signal=INT "$@"; (($? == 0 || $? == 124))' _ \
    "$reproduce" \
    "$python" -m llc_fast.cli reproduce dln-scaling --scale paper --device "$device" --output "$out/dln-scaling"
bench scaling 540 speed/bench_estimate --scaling --growing chains parameters --strategies default sequential compiled \
    "${scaling[@]}"

"$python" "$repo/benchmarks/gpu/gpu_report.py" "$out"
if ((${#failed[@]})); then
    printf '\nFAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nAll stages passed; results in %s\n' "$out"
