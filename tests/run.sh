#!/usr/bin/env bash
# All tests, after installing what they need, and those marked `megatron` on the newest Megatron-Core too:
#                                              bash tests/run.sh [pytest's arguments]
# The five-minute inner loop:                  bash tests/run.sh quick [pytest's arguments]
# Any tests on the newest Megatron-Core:       bash tests/run.sh newest [pytest's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/install.sh "${MEGALIGN_PLATFORM:-cpu}" --test

# Every rank would compile Megatron and vLLM anew.
unset PYTHONDONTWRITEBYTECODE
# Ranks share the cores, so one thread each; nothing may look for a hub.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .

run() { .venv/bin/python -m pytest "$@"; }

# A test fails when the version that it imports is not MEGALIGN_MEGATRON.
run_on_newest() {
    local version
    version=$(sed -n 's/^megatron-core==//p' tools/requirements-megatron-newest.txt)
    MEGALIGN_MEGATRON=$version PYTHONPATH=$PWD/.venv/megatron-$version${PYTHONPATH:+:$PYTHONPATH} run "$@"
}

# Tests without ranks, or with few.
ALONE=(tests/algos tests/config tests/conversion tests/data tests/tools)

# Those marked `megatron` on the newest Megatron-Core, and ALONE unless the arguments choose tests.
second_lane() {
    local failed=0
    run_on_newest "$@" -m "megatron and not vllm" -p no:cacheprovider || failed=$?
    if [[ $# -eq 0 ]]; then
        run "${ALONE[@]}" -p no:cacheprovider || failed=$?
    elif [[ $failed == 5 ]]; then # the arguments chose tests, and none of them is marked
        failed=0
    fi
    return "$failed"
}

case ${1:-} in
quick) run -m "not vllm and not ranks8 and not slow and not gpu" "${@:2}" ;;
newest) run_on_newest "${@:2}" ;;
*)
    # Two lanes side by side: many tests keep one core only, and all those of ALONE do. The second's words come last.
    if [[ $# -gt 0 ]]; then first=("$@"); else first=("${ALONE[@]/#/--ignore=}"); fi
    words=$(mktemp)
    second_lane "$@" > "$words" 2>&1 &
    other=$!
    trap 'kill "$other" 2> /dev/null || true; rm -f "$words"' EXIT
    failed=0
    run "${first[@]}" || failed=$?
    wait "$other" || failed=$?
    cat "$words"
    exit "$failed"
    ;;
esac
