"""A Hugging Face directory -> a Megatron-Core torch_dist checkpoint with upstream names, for any layout.

    python tools/hf_to_megatron.py --hf DIR --output CKPT [--dtype bfloat16]
    torchrun --nproc_per_node 8 tools/hf_to_megatron.py ...      # each rank converts a share

No GPU. Memory is that of a few tensors. CKPT/hugging_face/ keeps config.json, generation config and tokenizer for the
way back.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory")
    parser.add_argument("--output", type=Path, required=True, metavar="CKPT", help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; as in the files when not given")
    options = parser.parse_args(arguments)
    # After --help has been answered.
    from megalign.checkpoints.convert import dtype_of, hf_to_megatron
    from megalign.failure import report_uncaught

    report_uncaught()
    hf_to_megatron(options.hf, options.output, dtype_of(options.dtype))


if __name__ == "__main__":
    main()
