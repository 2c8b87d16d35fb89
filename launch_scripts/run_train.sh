#!/usr/bin/env bash
# Train on the GPUs of this machine (on one CPU process where there are none).
#
#     bash launch_scripts/run_train.sh [<root> [<code>]] [-- flags of train.py]
#     VARIANT=base DATA_PATH=~/imagenet bash launch_scripts/run_train.sh -- --amp-opt-level O0
#
# Exit code 75: a signal stopped the run, and it has saved. Start it again to continue.
#
# <root>      the data is at <root>/data/imagenet, which tools.prepare makes of Kaggle's folders, else at
#             <root>/data/ILSVRC/Data/CLS-LOC
# <code>      the checkout to run in; default: the one of this script
#
# From the environment (relative paths start at the checkout):
# VARIANT     miny tiny small base large digits; default small
# CFG         a YAML file, instead of VARIANT
# DATA_PATH   folder with train/ and val/; default ./datasets/imagenet
# OUTPUT      folder for runs; default ./output
# GPUS        processes, one per GPU; default: all GPUs of this machine
# BATCH_SIZE  images per GPU; default: the config's
# TAG         name of the run; default: the config's
# SETUP       shell commands to run first, such as: module load cuda; they may set the variables above
# PYTHON      the interpreter; default: the checkout's .venv, else python3. It may have arguments, as for a container:
#             PYTHON="apptainer exec --nv image.sif python"
#
# Nothing is downloaded: no internet is needed.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
run_distributed train.py "$@"
