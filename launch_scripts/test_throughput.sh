#!/usr/bin/env bash
# Measure the images per second and the peak memory of a variant on one device. Needs neither data nor weights.
#
#     bash launch_scripts/test_throughput.sh [<variant>|all] [-- flags of test.py]
#
# The variant may also come from VARIANT, or a YAML file from CFG; default small. `all`: the five published variants.
# SETUP and PYTHON from the environment: as for run_train.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
run_measurement --throughput "$@"
