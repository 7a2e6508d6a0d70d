#!/usr/bin/env bash
# All that wants a CUDA GPU, in independent parts, each with a record; a page is made from the records (benchmarks/sitting).
#     benchmarks/on_gpu.sh OUT                       all parts, in an hour at most
#     benchmarks/on_gpu.sh OUT --parts t4 embedded   these
#     benchmarks/on_gpu.sh OUT --device cpu          small, to try it
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m benchmarks.sitting "$@"
