#!/usr/bin/env bash
# Train on several machines under SLURM; submit it from the checkout. What sbatch is told here, its flags override.
#
#     sbatch launch_scripts/slurm_train.sh [-- flags of train.py]
#     sbatch --nodes=4 --export=ALL,VARIANT=base,DATA_PATH=~/imagenet launch_scripts/slurm_train.sh
#
#SBATCH --job-name=groupmixformer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#
# One task a node runs multi_machine_start.py, which starts torchrun there. 120 seconds before the time is up the run
# saves, ends with code 75, and the job is requeued; train.py then continues from its last checkpoint. The tag must not
# change in between, which is why it is a fixed name and not the job's number.
#
# From the environment, relative paths being taken from the checkout:
# VARIANT, CFG, DATA_PATH, OUTPUT, BATCH_SIZE, TAG, PYTHON   see run_train.sh; OUTPUT is a folder that all nodes share
# GPUS        processes on each node, one per GPU; default: what SLURM gave, else 8
# RETRIES     times that a node starts torchrun again after a fault; default 3
# CODE_PATH   the checkout; default: the folder that sbatch was called in
set -euo pipefail

# sbatch runs a copy of this file from a folder of its own: the checkout is where it was submitted.
code=${CODE_PATH:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -f $code/multi_machine_start.py ]]; then
    echo "slurm_train.sh: no multi_machine_start.py in $code: submit from the checkout, or set CODE_PATH" >&2
    exit 1
fi
cd -- "$code"
source launch_scripts/common.sh
split_arguments 0 "$@"
[[ -n ${SLURM_JOB_ID:-} ]] || die "not inside a SLURM job: start it with sbatch"
choose_python "$ROOT"
choose_config "$ROOT"

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# One port per job, so that jobs that share a node do not meet; below the ports that the kernel hands out by itself.
port=$((15000 + SLURM_JOB_ID % 15000))
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}

launch=("$PYTHON" multi_machine_start.py --machine_num "$SLURM_JOB_NUM_NODES" --np "$GPUS"
    --ip "${nodes%%$'\n'*}" --main_port "$port" --retries "${RETRIES:-3}" --config "$CFG"
    --data_path "${DATA_PATH:-./datasets/imagenet}" --output "${OUTPUT:-./output}")
[[ -z ${BATCH_SIZE:-} ]] || launch+=(--batchsize "$BATCH_SIZE")
[[ -z ${TAG:-} ]] || launch+=(--tag "$TAG")
launch+=(-- "${EXTRA[@]}")

# Once a node's task has ended, the others get as long as a checkpoint takes, and are then ended too. They are not ended
# at once: the first node to end with 75 would take the others' code 75 from them.
step=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1
    --kill-on-bad-exit=0 --wait=120)
# srun no longer takes this over from sbatch by itself; without it the data loaders would share one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")

srun_pid=""
ending=""
# Always USR1: srun hands it to the tasks, whereas on TERM it would end them itself. TERM reaches the tasks from SLURM,
# when the job is cancelled or preempted.
trap 'kill -USR1 "$srun_pid" 2>/dev/null || true' USR1
trap 'ending=1' TERM
"${step[@]}" "${launch[@]}" &
srun_pid=$!

# Short sleeps rather than one long `wait`: when two signals come together, bash runs the trap of one and leaves the
# other's until wait returns, which would be hours later.
while [[ -n $(jobs -rp) ]]; do sleep 1 || true; done
status=0
wait "$srun_pid" || status=$?

# 75 (EX_TEMPFAIL) is how train.py says "saved, start me again". A job that SLURM ends is SLURM's: it requeues what it
# preempted, and what a user cancelled must not come back.
if ((status == 75)) && [[ -z $ending ]]; then
    echo "slurm_train.sh: the run is saved; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
