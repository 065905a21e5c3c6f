#!/usr/bin/env bash
# All that only a GPU can show, in one go: the tests that need one, and the speed table, eager and compiled.
#   benchmarks/gpu.sh CONVERSATIONS.jsonl [more flags of benchmarks.compare, such as --model DIRECTORY --random-weights]
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "$1") && shift
python -m pytest tests/test_cuda.py tests/test_attention.py tests/test_loss.py tests/test_probe.py
python -m benchmarks.compare --device cuda --dtype bf16 --batch-size 32 --updates 10 --rounds 3 --data "$data" "$@"
python -m benchmarks.compare --device cuda --dtype fp16 --batch-size 32 --updates 10 --data "$data" \
    --engines "ours, packed" "ours, packed, compiled" "Trainer, best" "$@"
