#!/usr/bin/env bash
# From a fresh checkout to a trained and evaluated network in a few minutes, on a CPU or on one GPU, without ImageNet.
#
#     bash launch_scripts/quickstart.sh [flags of train.py]
#
# The script installs the requirements into .venv and writes scikit-learn's handwritten digits as a folder of images.
# It trains a small GroupMixFormer on them with train.py and evaluates the best checkpoint with test.py. A second call
# reuses all of it. train.py and test.py get the same flags, so that test.py builds the network that train.py trained.
#
# From the environment (relative paths start at the checkout):
# DATA_PATH          folder for the digits; default datasets/digits
# OUTPUT, TAG        the run folder is $OUTPUT/groupmixformer_digits/$TAG; default output and quickstart
# SETUP, PYTHON, NO_VENV=1  see setup_env.sh
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"
case ${1:-} in -h | --help) show_help && exit 0 ;; esac

setup_env
cd -- "$ROOT"
DATA_PATH=${DATA_PATH:-datasets/digits}
OUTPUT=${OUTPUT:-output}
TAG=${TAG:-quickstart}
run_folder=$OUTPUT/groupmixformer_digits/$TAG
flags=(--cfg configs/groupmixformer_digits.yaml --data-path "$DATA_PATH" --output "$OUTPUT" --tag "$TAG" "$@")

"${PYTHON_COMMAND[@]}" -m tools.digits --output "$DATA_PATH"
"${PYTHON_COMMAND[@]}" train.py "${flags[@]}"
"${PYTHON_COMMAND[@]}" test.py "${flags[@]}" --resume "$run_folder/ckpt_best.pth"

folder=$(dirname -- "${PYTHON_COMMAND[0]}")
tensorboard=("$folder/tensorboard")
[[ -x ${tensorboard[0]} ]] || tensorboard=("${PYTHON_COMMAND[@]}" -m tensorboard.main)
[[ $run_folder == /* ]] || run_folder=$ROOT/$run_folder
[[ ! -f $folder/activate ]] || echo "Other commands need this environment: source $(printf '%q' "$folder/activate")"
echo "Run folder: $run_folder"
echo "Look at it: $(printf '%q ' "${tensorboard[@]}" --logdir "$run_folder")"
