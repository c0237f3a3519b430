"""How far per-token logprobs are from transformers', for every model family at every layout.

    python tools/parity_matrix.py --json FILE [--families llama mixtral] [--layouts TP2+SP CP2] [--mcore 0.16.1 0.19.2]

Tiny random models in fp32 on real gloo ranks: packed batches, a temperature for each sequence. A cell is the largest
absolute difference over all tokens. The JSON file is a list of family, layout, mcore and max_abs_diff; the table on
standard output is the README's. Ends with status 1 where a cell is not under --tolerance. A Megatron-Core other than
the installed one is taken from .venv/megatron-VERSION, where tools/install.sh puts it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tiny models, ranks and reference are the tests'

from tests.layouts import ONE_RANK, Layout  # noqa: E402
from tests.megatron_version import found_version  # noqa: E402
from tests.parity import largest_difference  # noqa: E402
from tests.tiny import CONFIGS, MOE_CONFIGS, TinyModels  # noqa: E402

LAYOUTS = {
    "one rank": ONE_RANK,
    "TP2+SP": Layout(tp=2, sp=True),
    "PP2": Layout(pp=2),
    "VPP2xPP2": Layout(pp=2, vpp=2),
    "PP2, 1+3 layers": Layout(pp=2, first=1),
    "CP2": Layout(cp=2),
    "TP2xPP2": Layout(tp=2, pp=2),
    "TP2xCP2": Layout(tp=2, cp=2),
    "EP2": Layout(dp=2, ep=2),
    "EP2xPP2": Layout(dp=2, pp=2, ep=2),
    "TP2xEP2, ETP1": Layout(tp=2, sp=True, ep=2, etp=1),
    "TP2xEP2, ETP2": Layout(tp=2, sp=True, dp=2, ep=2, etp=2),
    "TP2xPP2xDP2": Layout(tp=2, pp=2, dp=2),
}
Row = dict[str, Any]


def layout_for(family: str, name: str) -> Layout | None:
    """The layout; with sequence parallelism for experts, which Megatron demands; None: it splits experts, of none."""
    layout = LAYOUTS[name]
    if family in MOE_CONFIGS:
        return layout._replace(sp=layout.tp > 1)
    return None if layout.ep > 1 or layout.etp is not None else layout


def measure(families: Sequence[str], names: Sequence[str]) -> list[Row]:
    """A row for each cell on the Megatron-Core that this process imports."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        models = TinyModels(Path(directory))
        for name in names:  # the outer loop, since its process groups are then made once
            for family in families:
                if (layout := layout_for(family, name)) is None:
                    continue
                worst = largest_difference(models[family], layout)
                rows.append({"family": family, "layout": name, "mcore": found_version(), "max_abs_diff": worst})
                print(f"{rows[-1]['mcore']}  {name:16} {family:16} {worst:.1e}", file=sys.stderr, flush=True)
    return rows


def measure_elsewhere(version: str, families: Sequence[str], names: Sequence[str]) -> list[Row]:
    """The same in a process of its own that finds another Megatron-Core first."""
    other = ROOT / ".venv" / f"megatron-{version}"
    if not other.is_dir():
        raise SystemExit(
            f"megatron-core {version} is neither installed nor in {other}; run tools/install.sh cpu --test"
        )
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--json", file.name, "--tolerance", "inf", "--no_table"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(other), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([*command, "--families", *families, "--layouts", *names], env=environment, check=True)
        rows = json.load(file)
    assert {row["mcore"] for row in rows} <= {version}, f"{version} was asked for"
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: families by layouts, in each cell the largest of the versions' numbers."""
    names = list(dict.fromkeys(row["layout"] for row in rows))
    cells: dict[tuple[str, str], float] = {}
    for row in rows:
        place = (row["family"], row["layout"])
        cells[place] = max(cells.get(place, 0.0), row["max_abs_diff"])
    lines = [f"| family | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for family in dict.fromkeys(row["family"] for row in rows):
        found = [f"{cells[family, name]:.1e}".replace("e-0", "e-") if (family, name) in cells else "" for name in names]
        lines.append(f"| {family} | {' | '.join(found)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(CONFIGS), default=sorted(CONFIGS))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--mcore", nargs="+", default=[found_version()])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--no_table", action="store_true")
    args = parser.parse_args(words)
    rows = []
    for version in args.mcore:
        here = version == found_version()
        rows += (
            measure(args.families, args.layouts) if here else measure_elsewhere(version, args.families, args.layouts)
        )
    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not args.no_table:
        print(table(rows))
    over = [row for row in rows if not row["max_abs_diff"] < args.tolerance]
    for row in over:
        print(f"{row} is not under {args.tolerance}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
