#!/usr/bin/env bash
# All tests, after installing what they need:  bash tests/run.sh [pytest's arguments]
# The five-minute inner loop:                  bash tests/run.sh quick [pytest's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/install.sh "${MEGALIGN_PLATFORM:-cpu}" --test

# Every rank would compile Megatron and vLLM anew.
unset PYTHONDONTWRITEBYTECODE
# Ranks share the cores, so one thread each; nothing may look for a hub.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .

if [[ ${1:-} == quick ]]; then
    shift
    exec .venv/bin/python -m pytest -m "not vllm and not ranks8 and not slow and not gpu" "$@"
fi
exec .venv/bin/python -m pytest "$@"
