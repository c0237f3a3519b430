# Sourced by the .sbatch files, with megalign's words: one torchrun a node, and what Slurm's signal leads to.
# shellcheck shell=bash

# Slurm starts one torchrun a node; they meet at the first node of the job.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 12000))

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

srun --kill-on-bad-exit=1 bash examples/slurm/one_node.sh \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head_node:$port" \
    -m megalign "$@" &
step=$!

# Slurm tells the script alone; srun hands the signal on to every node.
asked=
trap 'asked=1; kill -USR1 "$step" || true' USR1
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done  # a trap ends a wait too
status=0
wait "$step" || status=$?
if [[ -n $asked && $status == 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
