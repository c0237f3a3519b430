"""A Megatron-Core torch_dist checkpoint -> a Hugging Face directory that transformers and vLLM load.

    python tools/megatron_to_hf.py --checkpoint CKPT --output DIR [--hf-reference DIR] [--dtype bfloat16]
    torchrun --nproc_per_node 8 tools/megatron_to_hf.py ...      # each rank writes a share of the files

CKPT is a torch_dist directory, a trainer's checkpoint-N, or Megatron-LM's save directory. megalign's own say what the
model is; of another program's the reference says it, and its tokenizer is copied. The optimizer is left out. No GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--hf-reference", type=Path, metavar="DIR", help="its config.json and tokenizer are the model's"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; as in the checkpoint when not given")
    parser.add_argument("--max-shard-size", default="5GB", help="of a file (default: 5GB)")
    options = parser.parse_args(arguments)
    # After --help has been answered.
    from megalign.checkpoints.convert import dtype_of, megatron_to_hf
    from megalign.failure import report_uncaught

    report_uncaught()
    left_out = megatron_to_hf(
        options.checkpoint, options.output, options.hf_reference, dtype_of(options.dtype), options.max_shard_size
    )
    for name, rows in left_out.items():
        print(f"{name}: its last {rows} rows are no tokens of config.json's vocabulary (pads); left out")


if __name__ == "__main__":
    main()
