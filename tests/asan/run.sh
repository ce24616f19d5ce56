#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Codec and loader under AddressSanitizer and UBSan: the Python tests of the codec with an instrumented library, then whole model files, cut
# and damaged, through an instrumented llama.cpp. Usage: run.sh BIN, BIN being the bin folder of the Python environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$1
work=build/asan
mkdir -p "$work"

built=$("$bin/entrollm" runtime build --sanitize address)
export UBSAN_OPTIONS=print_stacktrace=0

echo "== codec"
# the interpreter is not instrumented, so the runtime comes by preload, and Python's own allocations look like leaks
ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    ENTROLLM_CODEC_LIBRARY="$built/libggml-base.so" \
    "$bin/python" -m pytest -q tests/unit/test_codec.py tests/unit/test_code_plan.py tests/unit/test_malformed.py -p no:cacheprovider 2>&1 | tee "$work/codec.log"

echo "== loader"
status=0
for model in $("$bin/python" tests/asan/make_models.py "$work"); do
    "$built/test-entropy-load" "$model" 2>&1 | tee "$work/load-$(basename "$model").log" || status=1
done

# upstream's own undefined behaviour is not ours to fail on
if grep -h "runtime error" "$work"/*.log | grep entropy; then
    status=1
fi
exit $status
