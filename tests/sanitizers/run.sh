#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Codec, ops and loader under sanitizers. Usage: run.sh BIN address|thread, BIN being the bin folder of the Python environment.
#
# address (with UBSan): the Python tests of the codec with an instrumented library; every op at every kernel level; whole model files through
# the loader, cut, damaged, and rewritten while they run: a quarter of these cases, or what PART=N/I says (the I-th of N parts; 1/1 is all).
# thread: every op with 1 to 8 threads.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$1
kind=$2
work=build/sanitizers/$kind
mkdir -p "$work"
rm -f "$work"/*.log

built=$("$bin/entrollm" runtime build --sanitize "$kind")
export UBSAN_OPTIONS=print_stacktrace=0
export TSAN_OPTIONS="halt_on_error=0 exitcode=66"
status=0

# a library that was built without instrumentation finds nothing
for library in ggml-base ggml-cpu; do
    if ! nm "$built/lib$library.so" | grep "__${kind:0:1}san_" > /dev/null; then
        echo "lib$library.so is not instrumented" >&2
        exit 1
    fi
done

ops() {
    "$bin/python" tests/fused_cases.py "$work/cases.gguf"
    local levels # apart from the assignment, whose failure it would hide
    levels=$("$built/test-entropy-ops" --levels)
    for level in $levels; do
        echo "== ops, level $level"
        GGML_ENTROPY_KERNEL=$level "$built/test-entropy-ops" "$work/cases.gguf" "$work/out.f32" "$@" 2>&1 | tee "$work/ops-$level.log" || status=1
    done
    echo "== ops, stock products"
    GGML_ENTROPY_PRODUCTS=stock "$built/test-entropy-ops" "$work/cases.gguf" "$work/out.f32" "$@" 2>&1 | tee "$work/ops-stock.log" || status=1
}

if [ "$kind" = address ]; then
    echo "== codec"
    # the interpreter is not instrumented, so the runtime comes by preload, and Python's own allocations look like leaks
    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
        ENTROLLM_CODEC_LIBRARY="$built/libggml-base.so" \
        "$bin/python" -m pytest -q tests/unit/test_codec.py tests/unit/test_code_plan.py tests/unit/test_vectors.py \
        tests/unit/test_malformed.py tests/unit/test_damaged.py tests/unit/test_ebf16.py -p no:cacheprovider 2>&1 | tee "$work/codec.log"
    ops 1 3
    echo "== loader, load and fused mode"
    for model in $("$bin/python" tests/sanitizers/make_models.py "$work"); do
        for mode in load fused; do
            GGML_ENTROPY_MODE=$mode "$built/test-entropy-load" "$model" --jobs "${PART:-4/1}" 2>&1 | tee "$work/load-$mode-$(basename "$model").log" || status=1
        done
    done
else
    ops 1 2 3 4 8
fi

# upstream's own findings are not ours to fail on
if grep -h -A3 "runtime error\|SUMMARY" "$work"/*.log | grep entropy; then
    status=1
fi
[ "$status" = 0 ] && echo "sanitizers ($kind): nothing found"
exit $status
