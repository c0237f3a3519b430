"""Kills a rank of a small SFT job at a random moment, and looks at what the others do and what is left.

    python tools/fault_trials.py --trials N --json FILE [--launchers forked plain torchrun] [--seed 0]

A trial: 2 to 4 ranks of a tiny model at one of several layouts, each step followed by a checkpoint; `kill -9` of any
rank at any moment from its first on: while it starts, in a step, inside a save, while the model is exported. The other
ranks must be gone within 45 s and the log must name the one that was killed, and no other. Then the job is started
again with resume_from_checkpoint latest: its losses and its final weights must be those of a run that nobody disturbed.
`torchrun` and `plain` start Python anew for each rank (plain: nobody ends a rank because another has left); `forked`
ranks are plain too, from a server that has imported torch already. Ends with status 1 where a trial fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the trial and its tiny model are the tests'

from tests.jobs.inputs import save_model, sums, write_rows  # noqa: E402
from tests.jobs.trials import LAUNCHERS, LAYOUTS, PHASES, Trial, run_trial  # noqa: E402


def run_trials(number: int, launchers: Sequence[str], seed: int, here: Path) -> Iterator[Trial]:
    """Trials at random layouts, ranks and moments, the launchers in turn."""
    save_model(here / "model")
    write_rows(here / "rows.jsonl", sums(40))
    done = 0
    for attempt in itertools.count():
        if done == number:
            return
        draw = random.Random(f"{seed} {attempt}")
        layout = draw.choice(list(LAYOUTS))
        victim = draw.randrange(LAYOUTS[layout][0])
        trial = run_trial(launchers[done % len(launchers)], layout, victim, draw.choice(PHASES), here, draw)
        if trial is not None:
            done += 1
            yield trial


def main() -> None:
    """The exit status says whether all trials passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    trials = []
    with tempfile.TemporaryDirectory() as here:
        for trial in run_trials(options.trials, options.launchers, options.seed, Path(here)):
            trials.append(trial)
            options.json.write_text(json.dumps([asdict(one) | {"passed": one.passed} for one in trials], indent=1))
            print(f"{len(trials)}: {'passed' if trial.passed else 'FAILED'} {trial}", flush=True)
    passed = sum(trial.passed for trial in trials)
    slowest = max(trial.others_gone_s for trial in trials)
    print(f"{passed} of {len(trials)} trials passed; the others were gone after {slowest} s at the latest")
    sys.exit(passed != len(trials))


if __name__ == "__main__":
    main()
