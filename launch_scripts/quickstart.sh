#!/usr/bin/env bash
# From a fresh checkout to a trained and evaluated network in a few minutes, on a CPU or on one GPU, without ImageNet.
#
#     bash launch_scripts/quickstart.sh [detection | segmentation] [flags of train.py]
#
# The script installs the requirements into .venv and writes scikit-learn's handwritten digits as a folder of images.
# It trains a small GroupMixFormer on them with train.py and evaluates the best checkpoint with test.py. A second call
# reuses all of it. train.py and test.py get the same flags, so that test.py builds the network that train.py trained.
# With `detection` or `segmentation`, images are scenes of several digits, and a picture shows predictions at the end.
#
# From the environment (relative paths start at the checkout):
# DATA_PATH          folder for the images; default datasets/digits, or datasets/digit_scenes
# OUTPUT, TAG        the run folder is $OUTPUT/<name of the network>/$TAG; default output and quickstart
# SETUP, PYTHON, NO_VENV=1  see setup_env.sh
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"
case ${1:-} in -h | --help) show_help && exit 0 ;; esac

case ${1:-} in
detection | segmentation)
    maker=scenes folder=datasets/digit_scenes part=/$1 network=$1_digits cfg=$1/digits next=$1
    shift
    ;;
*) maker=digits folder=datasets/digits part='' network=groupmixformer_digits cfg=groupmixformer_digits next=fine-tuning ;;
esac

setup_env
cd -- "$ROOT"
DATA_PATH=${DATA_PATH:-$folder}
OUTPUT=${OUTPUT:-output}
TAG=${TAG:-quickstart}
run_folder=$OUTPUT/$network/$TAG
flags=(--cfg "configs/$cfg.yaml" --data-path "$DATA_PATH$part" --output "$OUTPUT" --tag "$TAG" "$@")

"${PYTHON_COMMAND[@]}" -m "tools.$maker" --output "$DATA_PATH"
"${PYTHON_COMMAND[@]}" train.py "${flags[@]}"
"${PYTHON_COMMAND[@]}" test.py "${flags[@]}" --resume "$run_folder/ckpt_best.pth"

folder=$(dirname -- "${PYTHON_COMMAND[0]}")
tensorboard=("$folder/tensorboard")
[[ -x ${tensorboard[0]} ]] || tensorboard=("${PYTHON_COMMAND[@]}" -m tensorboard.main)
[[ $run_folder == /* ]] || run_folder=$ROOT/$run_folder
[[ ! -f $folder/activate ]] || echo "Other commands need this environment: source $(printf '%q' "$folder/activate")"
echo "Run folder: $run_folder"
[[ -z $part ]] || echo "Predictions: $(ls "$run_folder"/evaluation/*/predictions.png)"
echo "Look at it: $(printf '%q ' "${tensorboard[@]}" --logdir "$run_folder")"
echo "Next: pictures of your own, docs/$next.md"
