#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build for its architecture, the op tests on the device, a sanitizer subset,
# the benchmarks and the default distillation. Logs and JSON go to the folder OUT (default benchmarks/results/gpu).
#
#     OUT=/some/folder bash benchmarks/gpu.sh                    all parts, some nine minutes on an H100
#     OUT=/some/folder bash benchmarks/gpu.sh build benchmarks   these parts alone
#
# A part that fails is reported and the next one goes on; the exit code is the number of failed parts.
# Needs nvcc, torch with CUDA, pybind11, cmake, ninja, pytest, pytest-benchmark, pytest-timeout, scipy; nothing is
# fetched.
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-benchmarks/results/gpu}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
failed=0

part() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "=== $name"
    if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
        echo "    ok, $((SECONDS - start)) s"
    else
        echo "    FAILED ($?), $((SECONDS - start)) s; the end of $OUT/$name.log:"
        tail -n 30 "$OUT/$name.log"
        failed=$((failed + 1))
    fi
}

build() {
    local arch
    arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
    DI4C_CUDA=on DI4C_CUDA_ARCHS="$arch" "$PYTHON" -m pip install --no-build-isolation --no-deps -e . || return
    "$PYTHON" -m di4c_ext.env
}

tests() {
    "$PYTHON" -m pytest tests/ops tests/test_random.py tests/test_loss.py tests/test_sampler.py tests/process
}

# The caching allocator would hide an access beyond a tensor inside one of its blocks.
sanitizer() {
    local tool
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$PYTHON" -m pytest tests/ops/test_rows.py tests/ops/test_absorbing.py -k cuda --timeout 0 || return
    done
}

benchmarks() {
    "$PYTHON" -m pytest benchmarks --benchmark-json="$OUT/benchmarks.json" || return
    "$PYTHON" benchmarks/report.py "$OUT/benchmarks.json" >"$OUT/benchmarks.md"
}

digits() {
    "$PYTHON" -m di4c_ext.distill --output_dir "$OUT/digits" --overwrite_output_dir
}

export PYTHON OUT
export -f build tests sanitizer benchmarks digits
[ $# -gt 0 ] || set -- build tests sanitizer benchmarks digits
for name in "$@"; do
    case $name in
        build) limit=240 ;;
        tests | benchmarks | digits) limit=180 ;;
        sanitizer) limit=150 ;;
        *) echo "unknown part '$name'; the parts are build tests sanitizer benchmarks digits" >&2; exit 64 ;;
    esac
    part "$name" "$limit" bash -c "$name"
done
exit "$failed"
