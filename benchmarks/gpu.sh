#!/usr/bin/env bash
# Everything that needs a GPU: its tests, the speed table, eager and compiled, and several processes over NCCL.
#   benchmarks/gpu.sh [CONVERSATIONS.jsonl [more flags of benchmarks.compare]]
# Needs torch, transformers and pytest only; Trainer also wants accelerate, TRL itself and liger-kernel, LitGPT itself: left out
# where they are missing, and TRL also without CONVERSATIONS, as random tokens have no tokenizer. Each step takes less than ten
# minutes and leaves its results in benchmarks/results/; a failed one does not stop the next. STEPS="2 3" runs some.
set -uo pipefail
cd "$(dirname "$0")/.."
results=benchmarks/results
if [ $# -gt 0 ]; then data=(--data "$(realpath "$1")"); shift; else data=(--synthetic); fi
common=(--device cuda --dtype auto --batch-size 32 --max-length 2048 --updates 6 --rounds 1 "${data[@]}" "$@")
visible=${CUDA_VISIBLE_DEVICES:-0}  # one GPU for the speed table: Trainer uses all that its process sees
compare=(env CUDA_VISIBLE_DEVICES="${visible%%,*}" python -m benchmarks.compare)
has() { python -c "from importlib.metadata import version; version('$1')" 2>/dev/null || { echo "== $1 is not installed: left out"; false; }; }
failed=0

step() {  # number, name, command
    local number=$1 name=$2; shift 2
    case " ${STEPS:-1 2 3 4 5 6 7 8} " in *" $number "*) ;; *) return ;; esac
    echo "== step $number: $name"
    timeout 590 "$@" 2>&1 | tee "$results/gpu-$number-$name.txt" || { echo "== step $number failed"; failed=1; }
}

step 1 tests python -m pytest -p benchmarks.bare -q tests/test_cuda.py tests/test_cuda_attention.py
step 2 eager "${compare[@]}" --tag gpu-eager --engines "ours, packed" "${common[@]}"
step 3 compiled "${compare[@]}" --tag gpu-compiled --engines "ours, packed, compiled" "${common[@]}"
has accelerate && step 4 trainer "${compare[@]}" --tag gpu-trainer \
    --engines "ours, padded" "Trainer, best" "Trainer, reference settings" "${common[@]}"
[ "${data[0]}" = --synthetic ] || { has trl && step 5 trl "${compare[@]}" --tag gpu-trl \
    --engines "TRL, packed" "TRL, padded, Liger" "${common[@]}"; }
step 6 fp16 "${compare[@]}" --tag gpu-fp16 \
    --engines "ours, packed" "ours, packed, compiled" "${common[@]}" --dtype fp16
step 7 nccl python -m pytest -p benchmarks.bare -q tests/test_cuda_processes.py
has litgpt && step 8 litgpt "${compare[@]}" --tag gpu-litgpt --engines LitGPT "${common[@]}"
exit $failed
