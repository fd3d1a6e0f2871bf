#!/usr/bin/env bash
# Build, test and time rpe_ops on a GPU. It takes less than 8 minutes on 16 cores.
#
#     gpu_check.sh [FILE]          build for this GPU, run tests and random cases, time everything, compare with goals
#     gpu_check.sh --tiny [FILE]   try this script without a GPU: small shapes and the installed rpe_ops
#
# Run it from any folder; `python` must be the environment's Python. It prints its output and writes it to FILE (default:
# benchmarks/gpu_NAME.txt, with the GPU's name). It exits with 1 if a test, a case or a model fails.
# Environment variables:
#     CASES, ROUNDS   number of random cases (default: 64) and of rounds of timing (default: 6)
#     BUILT           folder with an rpe_ops built for this PyTorch and GPU; the script then builds nothing
#     COMMIT          commit to print if git does not know it
#     TEST_SECONDS    seconds after which the tests are cut off (default: 300)
#     CHECK_MEMORY=1  also run compute-sanitizer's checks of memory and races, which take some more minutes
set -euo pipefail
tiny=
if [ "${1:-}" = --tiny ]; then
    tiny=1
    shift
fi
[ -z "${1:-}" ] || set -- "$(realpath -m "$1")" # a relative path is relative to the current folder, which changes next
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$scratch"' EXIT
name=$([ -n "$tiny" ] && echo tiny || python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '_'))")
result=$(realpath -m "${1:-../benchmarks/gpu_$name.txt}")
exec > >(tee "$result") 2>&1

stage() { echo; echo "== $1 ($((SECONDS / 60)) min $((SECONDS % 60)) s)"; }

if [ -n "$tiny" ]; then
    export TRITON_INTERPRET=1
    gpu=(--device cpu --tiny)
    tests=(tests/test_operators.py -k "test_operators_equal_their_definition and shape0 and dtype1")
    cases=1
    many=(--processes 1)
else
    if [ -z "${BUILT:-}" ]; then
        stage build
        BUILT="$scratch/site"
        FORCE_CUDA=1 python -m pip install --quiet --no-build-isolation --no-deps --target "$BUILT" .
    fi
    export PYTHONPATH="$BUILT${PYTHONPATH:+:$PYTHONPATH}"
    gpu=(--device cuda --rounds "${ROUNDS:-6}")
    # The other tests build for the CPU or run this script.
    tests=(tests/test_operators.py tests/test_rows.py tests/test_attention.py -m "not slow")
    if python -c "import xdist" 2>/dev/null; then
        tests+=(-n 6)
    fi
    cases=${CASES:-64}
    many=(--processes 8) # gpu.py uses the other cores
fi

# The models compile while the tests run. Their timing starts when no test uses the GPU any more.
python ../benchmarks/gpu.py "${gpu[@]}" --after "$scratch/free" >"$scratch/times" 2>"$scratch/notes" &
times=$!
python tests/rows_cases.py --cases "$cases" --quiet "${many[@]}" >"$scratch/cases" 2>&1 &
random=$!
failed=0
stage tests
# Each failure is printed when it happens, so that its name is known even if the time runs out.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} timeout --signal=INT ${TEST_SECONDS:-300} python -m pytest -v -p no:cacheprovider "${tests[@]}" 2>&1 \
    | grep -E "FAILED|ERROR|^E  |passed|failed|Timeout" || failed=1
stage "random cases against float64"
wait "$random" || failed=1
cat "$scratch/cases"
if [ -n "${CHECK_MEMORY:-}" ]; then
    stage "memory and races"
    for tool in memcheck racecheck synccheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python -m pytest -q -p no:cacheprovider \
            tests/test_operators.py -k "cuda and test_operators_equal_their_definition and (shape2 or shape4)" || failed=1
    done
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/rows_cases.py --cases 3 --processes 1 || failed=1
fi
if [ -z "$tiny" ]; then
    stage "the two operators and PyTorch's"
    python ../benchmarks/operators.py --device cuda --rounds 30 || failed=1
fi
touch "$scratch/free"
stage "steps, kernels, memory, tilings, goals"
tail -n +1 --pid="$times" -f "$scratch/times" # print lines as they come, so that they are not lost if time runs out
if ! wait "$times"; then
    failed=1
    tail -n 20 "$scratch/notes"
fi
stage "end: $([ $failed = 0 ] && echo "nothing failed" || echo "something FAILED")"
exit $failed
