#!/usr/bin/env bash
# All that wants a CUDA GPU, in one go: the tests marked gpu, the phase tables, the comparison with TRL, the planner
# beside real runs. Reports are written to the folder named first; the second argument is a folder with the config and
# tokenizer of Qwen2.5-0.5B-Instruct (weights are not needed).
#     benchmarks/on_gpu.sh OUT MODEL
set -euo pipefail
out=$1 model=$2
mkdir -p "$out"
python -m pytest -m gpu -ra 2>&1 | tee "$out/tests.txt"
shape=(--model "$model" --from_scratch --task arithmetic --difficulty 8 --eval_problems 0)
python -m benchmarks.step_time tiny --output "$out/step-time-tiny.md"
python -m benchmarks.step_time qwen-0.5b --model "$model" --output "$out/step-time-qwen-0.5b.md"
python -m benchmarks.step_time t4 "${shape[@]}" --output "$out/step-time-t4.md"
python -m benchmarks.compare_trl --speed tiny --steps 80 --output "$out/speed-tiny.md"
python -m benchmarks.compare_trl --speed qwen-0.5b --model "$model" --output "$out/speed-qwen-0.5b.md"
python -m benchmarks.compare_trl --speed t4 "${shape[@]}" --steps 10 --output "$out/speed-t4.md"
python -m benchmarks.plan --check --model "$model" | tee "$out/plan.md"
