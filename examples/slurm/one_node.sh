#!/usr/bin/env bash
# One node's torchrun, with the words that follow, whose ranks hear SIGUSR1: they stop in good order after their step.
# Started by srun in the .sbatch files. torchrun would die of the signal, and --signals-to-handle=SIGUSR1 would have it
# kill its ranks 30 seconds later, in the middle of a long step or save.
set -uo pipefail

# A rank that does not train yet hears nothing: it is told until all have left.
hand_on() (
    trap '' USR1
    while kill -0 "$agent" 2>/dev/null; do
        pkill -USR1 -P "$agent"
        sleep 2
    done
)

# A signal that comes before the agent has a name is told it then.
tell() {
    [[ -n $agent ]] || return 0
    [[ -z $ended ]] || { ended=''; kill -TERM "$agent"; }
    [[ $asked != now ]] || { asked=done; hand_on & }
}

# Before there is an agent: a signal between the two would end this script alone.
agent='' asked='' ended=''
trap 'asked=${asked:-now}; tell' USR1
trap 'ended=now; tell' TERM

# What is ignored stays so for torchrun and for its ranks until they train: the signal would end those that start.
(trap '' USR1 && exec .venv/bin/torchrun "$@") &
agent=$!
tell

while kill -0 "$agent" 2>/dev/null; do wait "$agent"; done  # a trap ends a wait too
wait "$agent"
