#!/usr/bin/env bash
# Everything about rpe_ops that needs a GPU, in one go: build for this GPU, tests, memory and race checks, benchmark.
# Run from anywhere, with the environment's Python as `python`; results are printed and kept in $1 (default: .).
set -euo pipefail
results=$(realpath "${1:-.}")
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
FORCE_CUDA=1 python -m pip install --quiet --no-build-isolation --no-deps --target "$site" .
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
python -m pytest tests -q 2>&1 | tee "$results/rpe_ops_gpu_tests.txt"
python ../benchmarks/operators.py --device cuda | tee "$results/rpe_ops_cuda.txt"
if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on PATH: memory and races were not checked" >&2
    exit 1
fi
for tool in memcheck racecheck synccheck; do
    compute-sanitizer --tool $tool --error-exitcode 1 python -m pytest tests/test_operators.py -q -p no:cacheprovider \
        -k "cuda and definition and (shape2 or shape4)" 2>&1 | tee -a "$results/rpe_ops_gpu_tests.txt"
done
