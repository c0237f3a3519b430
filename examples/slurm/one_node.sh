#!/usr/bin/env bash
# One node's torchrun, with the words that follow, whose ranks hear SIGUSR1: they stop in good order after their step.
# Started by srun in the .sbatch files. torchrun would die of the signal, and --signals-to-handle=SIGUSR1 would have it
# kill its ranks 30 seconds later, in the middle of a long step or save.
set -uo pipefail

.venv/bin/torchrun "$@" &
agent=$!
trap 'pkill -USR1 -P "$agent"' USR1
trap 'kill -TERM "$agent"' TERM

while kill -0 "$agent" 2>/dev/null; do wait "$agent"; done  # a trap ends a wait too
wait "$agent"
