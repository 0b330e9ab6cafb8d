#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under nine minutes on an H100: build for its architecture, the tests on the
# device, the sanitizers, every benchmark, the default distillation, steps of the published systems of pixels and of
# image tokens, a profile of the kernels.
#
#     bash benchmarks/gpu.sh                    every part that is not done yet, in order
#     bash benchmarks/gpu.sh build step         these parts, done or not
#     LIMIT=300 bash benchmarks/gpu.sh          stop starting parts after 300 seconds
#     bash benchmarks/gpu.sh list               the parts, and which are done
#
# A part has a time limit of its own; one that fails is reported and the next one goes on; one that passed leaves a mark
# in WORK (default build/gpu) and is skipped the next time, so a run that was cut off is resumed by the same command.
# OUT (default benchmarks/results/gpu) gets logs.tar.gz after every part, every JSON so far in it, and in the end
# benchmarks.md and .svg. The exit code is the number of parts that failed or were not reached.
#
# Nothing is fetched. Needed: python3 (or PYTHON) with torch for CUDA, numpy, pybind11, pytest, pytest-benchmark, scipy,
# transformers, accelerate, matplotlib; cmake, ninja, nvcc, a C++ compiler; compute-sanitizer and ncu for their parts.
# Peers (Liger-Kernel, FlashInfer, quack, TRL) are measured where they are installed.
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-benchmarks/results/gpu}"
WORK="${WORK:-build/gpu}"
PYTHON="${PYTHON:-python3}"
LIMIT="${LIMIT:-540}"
PARTS=(check build tests memcheck racecheck)
for file in benchmarks/bench_*.py; do
    file=${file#benchmarks/bench_}
    PARTS+=("${file%.py}")
done
PARTS+=(digits pixels_step tokens_step language_step profile)
mkdir -p "$OUT" "$WORK"
export PYTHON WORK
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE

limit_of() { # seconds; their sum may exceed LIMIT, which holds all the same
    case $1 in
        check) echo 60 ;;
        build) echo 180 ;;
        tests | digits) echo 120 ;;
        memcheck | racecheck) echo 60 ;;
        *) echo 75 ;;
    esac
}

# What is missing, by name and by what needs it, before minutes are spent. Warnings for what only one part needs.
check() {
    local missing=0 name
    for name in cmake ninja; do
        command -v "$name" >/dev/null || "$PYTHON" -c "import $name" 2>/dev/null ||
            { echo "MISSING: $name, on PATH or as a Python package"; missing=1; }
    done
    for name in "${CUDACXX:-nvcc}" "${CXX:-c++}"; do
        command -v "$name" >/dev/null || { echo "MISSING: $name on PATH"; missing=1; }
    done
    for name in torch numpy pybind11 pytest pytest_benchmark scipy transformers accelerate; do
        "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$name') is None)" ||
            { echo "MISSING: Python package $name"; missing=1; }
    done
    for name in compute-sanitizer ncu; do
        command -v "$name" >/dev/null || echo "warning: no $name, its part will fail"
    done
    "$PYTHON" - <<'PROGRAM' || missing=1
import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda)
assert torch.cuda.is_available(), "MISSING: a GPU that torch can use"
print(torch.cuda.get_device_name(), "sm_%d%d" % torch.cuda.get_device_capability())
PROGRAM
    nvidia-smi 2>/dev/null | head -n 15
    return "$missing"
}

# By CMake alone: no installation, so nothing but this folder changes and nothing but this folder is imported.
build() {
    local arch cmake ninja
    arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
    cmake=$(command -v cmake) || cmake="$PYTHON -m cmake"
    ninja=$(command -v ninja) || ninja=$("$PYTHON" -c 'import ninja; print(ninja.BIN_DIR + "/ninja")') || return
    # shellcheck disable=SC2086
    $cmake -S . -B "$WORK/cmake" -G Ninja -DCMAKE_MAKE_PROGRAM="$ninja" -DCMAKE_BUILD_TYPE=Release \
        -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
        -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
        -DDI4C_CUDA=ON -DDI4C_CUDA_REASON= -DCMAKE_CUDA_COMPILER="$(command -v "${CUDACXX:-nvcc}")" -DDI4C_CUDA_ARCHS="$arch" || return
    # shellcheck disable=SC2086
    $cmake --build "$WORK/cmake" --parallel "$(nproc)" || return
    rm -f di4c_ext/_C*.so
    cp "$WORK"/cmake/_C*.so di4c_ext/ || return
    "$PYTHON" -m di4c_ext.env || return
    has_kernels
}

has_kernels() {
    "$PYTHON" -c 'from di4c_ext.ops import native; assert native.available("cuda"), native.info()'
}

# The tests that touch a device; all the others were run without one.
tests() {
    "$PYTHON" -m pytest tests/ops tests/test_random.py tests/test_loss.py tests/test_sampler.py tests/process -k cuda
}

# torch's caching allocator would hide an access beyond a tensor inside one of its blocks.
memcheck() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 99 "$PYTHON" benchmarks/once.py
}

racecheck() {
    compute-sanitizer --tool racecheck --racecheck-report all --error-exitcode 99 "$PYTHON" benchmarks/once.py
}

digits() {
    "$PYTHON" -m di4c_ext.distill --output_dir "$WORK/digits" --overwrite_output_dir
}

# Of the published size, real networks and all; fails where it takes 12 GiB or more.
pixels_step() {
    "$PYTHON" benchmarks/pixels_step.py
}

# All but the network, ours and the published way, and with the published network; fails where ours takes 400 MB or more.
tokens_step() {
    "$PYTHON" benchmarks/tokens_step.py && "$PYTHON" benchmarks/tokens_step.py --by published &&
        "$PYTHON" benchmarks/tokens_step.py --layers 24 --micro_batch 8
}

# All but the network, every position masked, ours and the published way; fails where ours takes 2 GB or more.
language_step() {
    "$PYTHON" benchmarks/language_step.py --time 1 && "$PYTHON" benchmarks/language_step.py --time 1 --published
}

# Bytes through DRAM, time, registers and occupancy of every kernel of ours, to hold against the floor and the plan.
profile() {
    local shape
    for shape in "2 32 256 1025" "1 8 64 50258"; do
        # shellcheck disable=SC2086
        ncu --clock-control none --csv --kernel-name-base demangled --kernel-name regex:di4c --metrics \
            gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active \
            "$PYTHON" benchmarks/once.py $shape || return
    done
}

benchmark() { # family
    "$PYTHON" -m pytest "benchmarks/bench_$1.py" -p no:cacheprovider --benchmark-json="$WORK/$1.json"
}

is_done() {
    [ -e "$WORK/$1.done" ] || return
    # The mark may have outlived the machine it was built on.
    [ "$1" != build ] || has_kernels >/dev/null 2>&1
}

# The logs and rows there are so far; a family that was cut off has kept what it had measured.
collect() {
    local files
    for files in "$WORK"/*.json.partial; do
        [ ! -e "$files" ] || mv "$files" "${files%.partial}"
    done
    files=$(cd "$WORK" && find . -maxdepth 1 -name '*.log' -o -maxdepth 1 -name '*.json' -size +0)
    # shellcheck disable=SC2086
    [ -z "$files" ] || tar czf "$OUT/logs.tar.gz" -C "$WORK" $files
}

report() {
    local found=() name
    for name in "${PARTS[@]}"; do
        [ ! -s "$WORK/$name.json" ] || found+=("$WORK/$name.json")
    done
    [ ${#found[@]} -eq 0 ] || "$PYTHON" benchmarks/report.py "${found[@]}" --output "$OUT/benchmarks"
}

run() { # name: 0 where it passed
    local name=$1 start=$SECONDS left limit code
    limit=$(limit_of "$name")
    left=$((LIMIT - SECONDS))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -le 0 ]; then
        echo "=== $name: not reached, $LIMIT s are over; the same command resumes here"
        return 1
    fi
    rm -f "$WORK/$name.done"
    case $name in
        check | build | tests | memcheck | racecheck | digits | pixels_step | tokens_step | language_step | profile) set -- "$name" ;;
        *) set -- benchmark "$name" ;;
    esac
    timeout --kill-after=10 "$limit" bash -u -o pipefail -c '"$@"' gpu.sh "$@" >"$WORK/$name.log" 2>&1
    code=$?
    if [ "$code" -eq 0 ]; then
        touch "$WORK/$name.done"
        echo "=== $name: passed in $((SECONDS - start)) s; $(tail -n 1 "$WORK/$name.log" | cut -c1-120)"
    elif [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        echo "=== $name: CUT OFF after $limit s; the end of $WORK/$name.log:"
    else
        echo "=== $name: FAILED ($code) after $((SECONDS - start)) s; the end of $WORK/$name.log:"
    fi
    [ "$code" -eq 0 ] || tail -n 25 "$WORK/$name.log"
    return "$code"
}

export -f check build has_kernels tests memcheck racecheck digits pixels_step tokens_step language_step profile benchmark
for name in "$@"; do
    [[ " ${PARTS[*]} list " == *" $name "* ]] ||
        { echo "gpu.sh: unknown part '$name'; the parts are ${PARTS[*]}" >&2; exit 64; }
done
if [ "${1:-}" = list ]; then
    for name in "${PARTS[@]}"; do
        echo "$name$(is_done "$name" && echo ' (done)')"
    done
    exit
fi
failed=0
asked=("$@")
[ $# -gt 0 ] || asked=("${PARTS[@]}")
for name in "${asked[@]}"; do
    if [ $# -eq 0 ] && is_done "$name"; then
        echo "=== $name: done before"
        continue
    fi
    run "$name"
    code=$?
    collect
    if [ "$code" -ne 0 ]; then
        failed=$((failed + 1))
        case $name in check | build) echo "=== nothing works without the part $name"; break ;; esac
    fi
done
report || failed=$((failed + 1))
echo "=== $((SECONDS)) s in all, $failed parts failed or not reached; results in $OUT"
exit "$failed"
