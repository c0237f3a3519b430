#!/usr/bin/env bash
# All tests, after installing what they need, and those marked `megatron` on the newest Megatron-Core too:
#                                              bash tests/run.sh [pytest's arguments]
# The five-minute inner loop:                  bash tests/run.sh quick [pytest's arguments]
# Any tests on the newest Megatron-Core:       bash tests/run.sh newest [pytest's arguments]
# A -m among the arguments chooses from what would be run without it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
installed=cpu
[[ ! -e .venv/.cuda ]] || installed=cuda
bash tools/install.sh "${MEGALIGN_PLATFORM:-$installed}" --test

# Every rank would compile Megatron and vLLM anew.
unset PYTHONDONTWRITEBYTECODE
# Ranks share the cores, so one thread each; nothing may look for a hub.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .

# In this shell's place, so that a signal to the one is one to the other.
run() { exec .venv/bin/python -m pytest "$@"; }

# pytest with the marks of $1 and of the last -m behind it, which alone pytest would heed.
run_marked() {
    local marks=$1 own="" rest=()
    while shift && (($#)); do
        case $1 in
        -m) own=${2?"-m needs an expression"} && shift ;;
        -m*) own=${1#-m} ;;
        *) rest+=("$1") ;;
        esac
    done
    run -m "$marks${own:+ and ($own)}" "${rest[@]}"
}

# A test fails when the version that it imports is not MEGALIGN_MEGATRON.
choose_newest() {
    MEGALIGN_MEGATRON=$(sed -n 's/^megatron-core==//p' tools/requirements-megatron-newest.txt)
    PYTHONPATH=$PWD/.venv/megatron-$MEGALIGN_MEGATRON${PYTHONPATH:+:$PYTHONPATH}
    export MEGALIGN_MEGATRON PYTHONPATH
}

# Tests without ranks, or with few.
ALONE=(tests/algos tests/config tests/conversion tests/data tests/examples tests/tools)

# Those marked `megatron` on the newest Megatron-Core, and ALONE unless the arguments choose tests.
second_lane() {
    local failed=0
    (choose_newest && run_marked "megatron and not vllm" "$@" -p no:cacheprovider) || failed=$?
    if [[ $# -eq 0 ]]; then
        (run "${ALONE[@]}" -p no:cacheprovider) || failed=$?
    elif [[ $failed == 5 ]]; then # the arguments chose tests, and none of them is marked
        failed=0
    fi
    return "$failed"
}

both_lanes() {
    # Side by side: many tests keep one core only, and all those of ALONE do. The second's words come last.
    local failed=0
    local tests=("$@")
    [[ $# -gt 0 ]] || tests=("${ALONE[@]/#/--ignore=}")
    words=$(mktemp)
    trap 'rm -f "$words"' EXIT
    # Before there is a lane: a signal between the two would end this shell alone.
    trap 'stop INT 130' INT
    trap 'stop TERM 143' TERM
    set -m # a lane is a process group, which a signal ends as a whole
    second_lane "$@" < /dev/null > "$words" 2>&1 &
    second=$!
    run "${tests[@]}" < /dev/null &
    first=$!
    wait "$first" || failed=$?
    wait "$second" || failed=$?
    cat "$words"
    return "$failed"
}

# The first lane hears the signal, and tells after an interrupt what it has found so far; the second has no reader. A
# lane that has only just begun may have no name yet.
stop() {
    trap '' INT TERM
    local lane sent
    for lane in $(jobs -p); do
        sent=TERM
        [[ $lane != "${first:-}" ]] || sent=$1
        kill -s "$sent" -- "-$lane" 2> /dev/null || true
    done
    wait 2> /dev/null || true
    exit "$2"
}

case ${1:-} in
quick) run_marked "not vllm and not ranks8 and not slow and not gpu" "${@:2}" ;;
newest) choose_newest && run "${@:2}" ;;
*) both_lanes "$@" ;;
esac
