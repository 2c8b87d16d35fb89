#!/usr/bin/env bash
# Lint, then the test suite: the quick tests, several at a time.
#
#     bash launch_scripts/run_tests.sh [--ci | --all] [arguments of pytest]
#
# --ci    also tests that take long, launch processes, compile, or make network namespaces
# --all   everything: also repetitions and random kills, and GPUs where there are any
#
# Installs what is needed as setup_env.sh does (SETUP, PYTHON and NO_VENV=1 as there).
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"
case ${1:-} in -h | --help) show_help && exit 0 ;; esac

# pyproject.toml selects the quick tests; the later -m wins.
selection=()
case ${1:-} in
--ci) selection=(-m "not chaos and not gpu") && shift ;;
--all) selection=(-m "") && shift ;;
esac

setup_env dev
cd -- "$ROOT"
"${PYTHON_COMMAND[@]}" -m ruff check .
"${PYTHON_COMMAND[@]}" -m ruff format --check .
exec "${PYTHON_COMMAND[@]}" -m pytest -n 3 --dist worksteal "${selection[@]}" "$@"
