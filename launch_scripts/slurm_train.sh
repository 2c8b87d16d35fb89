#!/usr/bin/env bash
# Train on several machines under SLURM. Submit it from the checkout. Flags of sbatch override the #SBATCH lines.
#
#     sbatch launch_scripts/slurm_train.sh [-- flags of train.py]
#     sbatch --nodes=4 --export=ALL,VARIANT=base,DATA_PATH=~/imagenet launch_scripts/slurm_train.sh
#
# Many clusters want --partition and --account too. Fill in the first two lines and remove one #, or give these flags to
# sbatch.
#
##SBATCH --partition=<name>
##SBATCH --account=<name>
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
# One task per node runs multi_machine_start.py, which starts torchrun there. 120 seconds before the time is up the run
# saves and ends with code 75, and this script requeues the job. train.py then continues from its last checkpoint. The
# tag must stay the same for that, so it is a fixed name and not the number of the job. A task of an array has a run of
# its own: its number is added to the tag. What differs between the tasks comes from SETUP:
#
#     SETUP='EXTRA+=(--opts SEED $SLURM_ARRAY_TASK_ID)' sbatch --nodes=1 --array=0-2 launch_scripts/slurm_train.sh
#
# Process 0, on the first node, writes the checkpoints, and reads them when the run continues. SLURM may give a requeued
# job another first node, so OUTPUT must be a folder that all nodes share. Nodes need no internet: setup_env.sh installs
# before, on a login node, and nothing is downloaded later.
#
# From the environment (relative paths start at the checkout):
# VARIANT, CFG, DATA_PATH, OUTPUT, BATCH_SIZE, TAG, PYTHON   see run_train.sh
# SETUP       shell commands to run first, on the first node: module load cuda; all nodes get the variables that they set
# GPUS        processes on each node, one per GPU; default: the node's GPUs in this job, else 8
# RETRIES     how often a node starts torchrun again after a fault; default 3
# CODE_PATH   the checkout; default: the folder of the sbatch call
set -euo pipefail

# sbatch runs a copy of this file from another folder. The user submits from the checkout.
code=${CODE_PATH:-${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/..}}
if [[ ! -f $code/multi_machine_start.py ]]; then
    echo "slurm_train.sh: no multi_machine_start.py in $code: submit from the checkout, or set CODE_PATH" >&2
    exit 1
fi
cd -- "$code"
source launch_scripts/common.sh
split_arguments 0 "$@"
[[ -n ${SLURM_JOB_ID:-} ]] || die "not inside a SLURM job: start it with sbatch"
run_setup
choose_python "$ROOT"
choose_config "$ROOT"

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# One port per job, for jobs that share a node. It is below the ports that the kernel hands out.
port=$((15000 + SLURM_JOB_ID % 15000))
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}

launch=("${PYTHON_COMMAND[@]}" multi_machine_start.py --machine_num "$SLURM_JOB_NUM_NODES" --np "$GPUS"
    --ip "${nodes%%$'\n'*}" --main_port "$port" --retries "${RETRIES:-3}" --config "$CFG"
    --data_path "${DATA_PATH:-./datasets/imagenet}" --output "${OUTPUT:-./output}")
[[ -z ${BATCH_SIZE:-} ]] || launch+=(--batchsize "$BATCH_SIZE")
# The number of an array's last task is that of the whole array too. This name is the task's alone.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    TAG=${TAG:-array}_$SLURM_ARRAY_TASK_ID
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
[[ -z ${TAG:-} ]] || launch+=(--tag "$TAG")
launch+=(-- "${EXTRA[@]}")

# When the task of one node has ended, srun gives the others 120 seconds, enough for a checkpoint, and then ends them.
# Ending them at once would hide their own code 75.
step=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1
    --kill-on-bad-exit=0 --wait=120 --export=ALL)
# srun no longer inherits this from sbatch; without it the data loaders would share one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")

srun_pid=""
ending=""
# Always send USR1: srun forwards it to the tasks, but ends them itself on TERM. SLURM sends TERM to the tasks when it
# cancels or preempts the job.
trap 'kill -USR1 "$srun_pid" 2>/dev/null || true' USR1
trap 'ending=1' TERM
"${step[@]}" "${launch[@]}" &
srun_pid=$!

# Short sleeps instead of one long `wait`: when two signals come together, bash runs one trap and postpones the other
# until `wait` returns, which may take hours.
while [[ -n $(jobs -rp) ]]; do sleep 1 || true; done
status=0
wait "$srun_pid" || status=$?

# 75 (EX_TEMPFAIL) is how train.py says "saved, start me again". When SLURM ends the job, SLURM decides: it requeues
# a preempted job itself, and a cancelled job must not come back.
if ((status == 75)) && [[ -z $ending ]]; then
    echo "slurm_train.sh: the run is saved; requeueing job $job"
    scontrol requeue "$job"
fi
exit "$status"
