#!/usr/bin/env bash
# Everything the project says about GPUs, on a machine that has one: build from source with that machine's nvcc, run the
# tests marked `gpu`, measure, and hold what was measured against the targets.
#
#     bash benchmarks/gpu/gpu.sh [-o FOLDER] [-t SECONDS] STAGE…      (default: benchmarks/results/gpu, no limit)
#
#     stage          seconds  at most  what
#     build, info       30      240    always: the package, in a folder of its own
#
#     first            250             what says most, in one command: the stages down to `tests`
#     smoke             20      120    every kernel against the CPU
#     samplers          50      240    every sampler's bandwidth against a copy's: 1 chain, 4 chains, a bfloat16 model
#     step              30      120    one SGLD step of 10⁸ parameters against its rivals; one kernel a step
#     chains            40      240    1,024 parameters, 4 and 64 chains × 10,000 steps by CUDA graphs
#     large-tf32        60      240    10⁸ parameters at the paper's setting, TF32: as many of its 50,000 steps as 15 s
#                                      allow, the rest extrapolated; other strategies and a rival, fewer steps
#     tests             60      300    pytest -m gpu
#
#     second           260             the stages down to `dln-scaling`
#     kernels           30       90    the step kernels alone, without Python: shares of a copy's bytes per second
#     language          60      240    a GPT-NeoX-shaped bfloat16 model of 1.4·10⁹ parameters, and a rival's loop
#     language-large    40      180    the same of 6.9·10⁹ parameters: whether it fits
#     step-devinterp2   20       60    devinterp 2.0.1's step of 10⁸ parameters
#     step-compiled     40       90    that of torch.compile, tensor by tensor and all at once
#     memory            40      240    peak memory of estimates of 10⁸ parameters
#     memcheck          60      240    compute-sanitizer on the kernels
#     dln-scaling     REPRODUCE+100    the six classes of deep linear networks, smallest first, for REPRODUCE=60 seconds
#
#     by name only
#     large-whole      180      400    all 50,000 steps of 10⁸ parameters, TF32, and λ̂
#     large-float32    400      540    the same in float32, stopped and extrapolated after 350 s
#     racecheck         60      240    compute-sanitizer
#     ncu               60      240    every step kernel under Nsight Compute
#     profile           60      120    torch's profiler on a few steps of `chains`, `large-tf32` and `language`: where
#                                      the time goes
#     graph             15       60    a small network's step as a graph without llc_fast: in a row, and in branches
#     scaling          360      540    how a step's time grows with chains and parameters
#
# The seconds are expected on an H100. With -t a stage gets at most what is left of SECONDS, and one that would get less
# than ten seconds is skipped. Each stage writes its file as soon as it has measured something.
#
# Uses the Python environment it is started in (PYTHON=…): torch with CUDA, pybind11, ninja, setuptools ≥ 77, pytest, and
# what the package itself needs. Nothing is fetched and nothing is installed into that environment. Rows of devinterp
# 1.3.2 and 2.0.1 appear if DEVINTERP1 and DEVINTERP2 name the folders that they were installed into (pip install
# --target FOLDER): they have one import name. A stage that fails or takes too long does not stop the next; the exit
# status tells. FOLDER holds gpu.log, stages.tsv, a JSON file for each stage that measures, report.md (see gpu_report.py,
# which also joins the folders of several calls), and results.tar.gz, all of these in one.
#
# To try the script itself: DEVICE=cpu SMOKE=1 bash benchmarks/gpu/gpu.sh runs every stage on tiny problems without a GPU;
# SITE=FOLDER takes the package from there instead of building it.
set -uo pipefail

first=(smoke samplers step chains large-tf32 tests)
second=(kernels language language-large step-devinterp2 step-compiled memory memcheck dln-scaling)
others=(large-whole large-float32 racecheck ncu profile graph scaling)
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$repo/benchmarks/results/gpu
end=
while getopts o:t: option; do
    case $option in
        o) out=$OPTARG ;;
        t) end=$((SECONDS + OPTARG)) ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
wanted=()
for name in "${@:-first second}"; do
    case $name in
        first) wanted+=("${first[@]}") ;;
        second) wanted+=("${second[@]}") ;;
        "first second") wanted+=("${first[@]}" "${second[@]}") ;;
        *)
            if [[ " ${first[*]} ${second[*]} ${others[*]} " != *" $name "* ]]; then
                echo "unknown stage '$name'; choose from: first (${first[*]}) second (${second[*]}) ${others[*]}" >&2
                exit 2
            fi
            wanted+=("$name")
            ;;
    esac
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
    local name=$1 limit=$2 started=$SECONDS status left
    shift 2
    if [[ -n $end ]]; then
        left=$((end - SECONDS))
        if ((left < 10)); then
            printf '\n==> %s: skipped, no time left\n' "$name" | tee -a "$out/gpu.log"
            return
        fi
        limit=$((limit < left ? limit : left))
    fi
    printf '\n==> %s\n' "$name" | tee -a "$out/gpu.log"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/gpu.log"
    status=${PIPESTATUS[0]}
    ((status == 0)) || failed+=("$name")
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - started))" >>"$out/stages.tsv"
    printf '<== %s: exit status %s after %s s\n' "$name" "$status" "$((SECONDS - started))"
    "$python" "$repo/benchmarks/gpu/gpu_report.py" "$out" >/dev/null
    tar -czf "$work/results.tar.gz" -C "$out" --exclude=results.tar.gz --exclude=work . && mv "$work/results.tar.gz" "$out"
    return "$status"
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
        --no-deps --no-build-isolation --no-index --target "$site" . || exit 1
fi
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' "$repo/tests")
export PYTHONPATH=$site:$repo/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
cd "$work" || exit 1 # the checkout's own llc_fast has no native module
stage info 60 "$python" -m llc_fast.cli info

network=$repo/build/dln-100M-342.pt # ignored by git; the next call on the same machine finds it
if [[ -z ${SMOKE:-} ]]; then
    step=(--repeats 10) samplers=(--repeats 7) once=() chains=(--steps 10000 --rival-steps 1000) memory=()
    scaling=() large=(--network "$network") short=(--short 200 --seconds 15 --samples 50000) reproduce=${REPRODUCE:-60}
    language=(--size 1.4b --batch 4 --steps 40 --seconds 60) profile=() whole=(--size 6.9b --batch 1 --steps 20 --seconds 150)
else
    network=$work/network.pt
    step=(--repeats 1 --parameters 100000) samplers=(--repeats 1 --quick) once=(--quick) memory=(--width 20 --layers 3)
    chains=(--steps 20 --rival-steps 40) scaling=(--budget 0.05) short=(--short 10 --samples 2000)
    large=(--size 1k --seed 0 --steps 40 --network "$network") reproduce=${REPRODUCE:-10}
    language=(--size tiny --steps 6) profile=(--language tiny) whole=(--size tiny --steps 6)
fi

# The network of `large-…` takes half a minute of singular value decompositions: made beside the first stages.
making=
if [[ " ${wanted[*]} " == *" large-"* && ! -e $network ]]; then
    mkdir -p "$(dirname "$network")"
    OMP_NUM_THREADS=8 nice "$python" "$repo/benchmarks/gpu/bench_large.py" "${large[@]}" --make-network >>"$out/network.log" 2>&1 &
    making=$!
fi

pytest=("$python" -m pytest -q -m gpu --rootdir "$repo" -c "$repo/pyproject.toml" -p no:cacheprovider)
# Errors of CUDA's functions are left out: torch asks for functions that a driver may lack. Without torch's cache every
# tensor is an allocation of its own, so that memcheck sees where it ends.
kernels=(-k "gpu_equals_cpu or gpu_noise or low_precision")
sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)

when smoke 120 "${pytest[@]}" "${gpu_tests[@]}" "${kernels[@]}"
bench samplers 240 speed/bench_samplers "${samplers[@]}"
ours=$PYTHONPATH
export PYTHONPATH=$ours${DEVINTERP1:+:$DEVINTERP1}
bench step 120 speed/bench_step "${step[@]}" --contenders copy floor ours adam theirs
bench chains 240 speed/bench_estimate --sizes 1024 --chains 4 64 --per-step "${chains[@]}" --contenders llc_fast devinterp
[[ -z $making ]] || wait "$making"
bench large-tf32 240 gpu/bench_large "${large[@]}" "${short[@]}" --contenders llc_fast:tf32 llc_fast:tf32:cuda-graph \
    llc_fast:tf32:kept devinterp:tf32
export PYTHONPATH=$ours
when tests 300 "${pytest[@]}" "${workers[@]}" --durations 15 "${gpu_tests[@]}"

# shellcheck disable=SC2016
when kernels 90 bash -c '
    architecture=native
    if [[ $3 != cuda ]]; then # they only compile, where there is a compiler
        architecture=sm_90
        type -p nvcc >/dev/null || exit 0
    fi
    nvcc -arch=$architecture -O3 -std=c++17 --fmad=false -DNDEBUG -DLLC_WITH_CUDA -I "$1/csrc" -o "$0/kernels" \
        "$1/benchmarks/gpu/bench_kernels.cu" || exit
    [[ $3 != cuda ]] || "$0/kernels" 100000000 "$2/kernels.json"' "$work" "$repo" "$out" "$device"
export PYTHONPATH=$ours${DEVINTERP2:+:$DEVINTERP2}
bench language 240 gpu/bench_language "${language[@]}" --contenders llc_fast loop devinterp
bench language-large 180 gpu/bench_language "${whole[@]}" --contenders llc_fast
bench step-devinterp2 60 speed/bench_step "${step[@]}" --contenders copy ours theirs
export PYTHONPATH=$ours
bench step-compiled 90 speed/bench_step "${step[@]}" --contenders copy ours compiled compiled-all
bench memory 240 speed/bench_memory "${memory[@]}" --contenders sgld sgld-released rmsprop-sgld
when memcheck 240 "${sanitizer[@]}" --tool memcheck --report-api-errors no "${pytest[@]}" "${gpu_tests[@]}" "${kernels[@]}"
# What is done is kept in FOLDER/dln-scaling, and the same command goes on with it.
# shellcheck disable=SC2016
when dln-scaling $((reproduce + 100)) bash -c 'timeout --foreground --signal=INT "$@"; (($? == 0 || $? == 124))' _ \
    "$reproduce" \
    "$python" -m llc_fast.cli reproduce dln-scaling --scale paper --device "$device" --output "$out/dln-scaling"

bench large-whole 400 gpu/bench_large "${large[@]}" --contenders llc_fast:tf32
bench large-float32 540 gpu/bench_large "${large[@]}" --seconds 350 --contenders llc_fast:float32
when racecheck 240 "${sanitizer[@]}" --tool racecheck "${pytest[@]}" "${gpu_tests[@]}" "${kernels[@]}"
sections=()
for section in SpeedOfLight MemoryWorkloadAnalysis WarpStateStats LaunchStats Occupancy; do
    sections+=(--section "$section")
done
once=("$python" "$repo/benchmarks/speed/bench_samplers.py" --device "$device" --once --layouts 1 "${once[@]}")
# shellcheck disable=SC2016
when ncu 240 bash -c 'ncu --profile-from-start off --clock-control none --kernel-name "regex:step_kernel|add_tiles" \
    --export "$0/steps" "${@:2}" && ncu --import "$0/steps.ncu-rep" --csv --page details >"$1/ncu.csv" &&
    ncu --import "$0/steps.ncu-rep" --page details --print-details all' "$work" "$out" "${sections[@]}" "${once[@]}"
bench profile 120 gpu/profile_steps --network "$network" "${profile[@]}"
bench graph 60 gpu/bench_graph
bench scaling 540 speed/bench_estimate --scaling --growing chains parameters --strategies default sequential compiled \
    "${scaling[@]}"

"$python" "$repo/benchmarks/gpu/gpu_report.py" "$out"
if ((${#failed[@]})); then
    printf '\nFAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nAll stages passed; results in %s\n' "$out"
