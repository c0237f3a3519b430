"""What is in a torch_dist checkpoint, of megalign or any Megatron-Core program: step, layout, tensors, sizes.

    python tools/inspect_checkpoint.py CKPT [--all]

CKPT as for megatron_to_hf.py. Only what files say of themselves is read, and no class in them is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megalign.checkpoints.inspect import TensorLine


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--all", action="store_true", help="the optimizer's tensors by name, too")
    options = parser.parse_args(arguments)
    # After --help has been answered.
    from megalign.checkpoints.inspect import summary_of
    from megalign.failure import report_uncaught

    report_uncaught()
    found = summary_of(options.checkpoint)
    print(f"{found.directory}: step {'not said' if found.step is None else found.step}, {found.model or 'no config'}")
    print(
        f"written at: {', '.join(f'{name}={size}' for name, size in found.layout.items()) or 'one rank, or not said'}"
    )
    for what, is_model in (("model", True), ("optimizer and other state", False)):
        lines = [line for line in found.tensors if line.is_model == is_model]
        print(f"{what}: {len(lines)} names, {sum(line.nbytes for line in lines) / 1e9:.3f} GB")
        if is_model or options.all:
            show(lines)


def show(lines: list[TensorLine]) -> None:
    """A line a tensor."""
    width = max((len(line.name) for line in lines), default=0)
    for name, shape, dtype, num_chunks, _ in lines:
        kind = str(dtype).removeprefix("torch.")
        print(f"  {name:{width}}  {kind:9} {list(shape)!s:28} {num_chunks} chunks")


if __name__ == "__main__":
    main()
