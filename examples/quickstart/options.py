"""The quickstart's flags, on the standard library alone: quickstart.sh reads them before it installs or deletes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse prints its usage as well."""
        self.exit(2, f"megalign: error: {message}; `{self.prog} --help` lists the flags\n")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What quickstart.sh and experiments vary; ends the process on --help and on a wrong flag."""
    parser = _Parser(
        prog="bash examples/quickstart.sh",
        description="GRPO on one-digit sums: two pipeline stages on two CPU ranks, with vLLM inside.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="quickstart/smollm2", help="Hugging Face directory [%(default)s]")
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="gets model/, reward.png, result.json [%(default)s]"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=42, help="[%(default)s]")
    parser.add_argument("--learning-rate", type=float, default=3e-5, help="[%(default)s]")
    parser.add_argument("--completions", type=int, default=32, help="a step, in groups of 8 [%(default)s]")
    parser.add_argument("--microbatch", type=int, default=8, help="completions a rank takes at once [%(default)s]")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto is bf16 where the processor multiplies in it [%(default)s]",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    arguments()
