#!/usr/bin/env bash
# Lint, then the test suite.
#
#     bash launch_scripts/run_tests.sh [--long] [arguments of pytest]
#
# --long runs the tests marked `long` too. Installs what is needed as setup_env.sh does (PYTHON and NO_VENV=1 as there).
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"
case ${1:-} in -h | --help) show_help && exit 0 ;; esac

selection=()
if [[ ${1:-} == --long ]]; then
    shift
    # pyproject.toml deselects the long tests, and those of GPUs, which skip without them; the later -m wins.
    selection=(-m "")
fi

setup_env dev
cd -- "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "${selection[@]}" "$@"
