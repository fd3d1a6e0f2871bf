#!/usr/bin/env bash
# Everything about rpe_ops that needs a GPU, in one go: build for this GPU, tests, memory and race checks, benchmarks.
# Run from anywhere, with the environment's Python as `python`; results are printed and kept in $1 (default: .), what
# concerns attention in gpu_NAME.txt. Meant to take less than 10 minutes; on a GPU it has not run yet.
set -euo pipefail
results=$(realpath "${1:-.}")
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
FORCE_CUDA=1 python -m pip install --quiet --no-build-isolation --no-deps --target "$site" .
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
python -m pytest tests -q 2>&1 | tee "$results/rpe_ops_gpu_tests.txt"
python ../benchmarks/operators.py --device cuda | tee "$results/rpe_ops_cuda.txt"
name=$(python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '_'))")
attention="$results/gpu_$name.txt"
python tests/fused_cases.py --cases 500 | tail -n 1 | tee "$attention"
python tests/fused_cases.py --cases 1 --length 4096 | tail -n 1 | tee -a "$attention"
python ../benchmarks/gpu.py | tee -a "$attention"
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ]; then
    python -m torch.distributed.run --standalone --nproc_per_node 2 ../benchmarks/gpu.py --steps-only | tee -a "$attention"
fi
if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on PATH: memory and races were not checked" >&2
    exit 1
fi
compute-sanitizer --tool memcheck --error-exitcode 1 python tests/fused_cases.py --cases 3 | tee -a "$attention"
for tool in memcheck racecheck synccheck; do
    compute-sanitizer --tool $tool --error-exitcode 1 python -m pytest tests/test_operators.py -q -p no:cacheprovider \
        -k "cuda and definition and (shape2 or shape4)" 2>&1 | tee -a "$results/rpe_ops_gpu_tests.txt"
done
