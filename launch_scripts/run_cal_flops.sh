#!/usr/bin/env bash
# Count the FLOPs and parameters of a variant, module by module. Needs neither data nor weights nor a GPU.
#
#     bash launch_scripts/run_cal_flops.sh [<variant>|all] [-- flags of test.py]
#
# The variant may also come from VARIANT, or a YAML file from CFG; default small. `all`: the five published variants.
# SETUP and PYTHON from the environment: as for run_train.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
run_measurement --flops "$@"
