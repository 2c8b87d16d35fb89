#!/usr/bin/env bash
# Evaluate weights on the GPUs of this machine: Acc@1 and Acc@5 over the whole validation set.
#
#     bash launch_scripts/run_eval.sh [<root> [<code>]] [-- flags of test.py]
#     VARIANT=small DATA_PATH=~/imagenet bash launch_scripts/run_eval.sh -- --resume ckpt_best.pth
#
# Without --resume or --pretrained, test.py takes the weights from pretrained/groupmixformer_<variant>.pth.
#
# <root>      the data is at <root>/data/imagenet, which tools.prepare makes of Kaggle's folders, else at
#             <root>/data/ILSVRC/Data/CLS-LOC
# <code>      the checkout to run in; default: the one of this script
#
# From the environment (relative paths start at the checkout):
# VARIANT     miny tiny small base large digits; default small
# CFG         a YAML file, instead of VARIANT
# DATA_PATH   folder with val/; default ./datasets/imagenet
# OUTPUT      folder for logs; default ./output
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
run_distributed test.py "$@"
