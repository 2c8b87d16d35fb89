#!/usr/bin/env bash
# Make the virtual environment .venv in the checkout and install requirements.txt. A second run reuses it.
#
#     bash launch_scripts/setup_env.sh [dev]
#
# `dev` also installs requirements-dev.txt. Other scripts source this file and call `setup_env [dev]`, which sets
# PYTHON_COMMAND to the interpreter and puts its folder first in PATH.
#
# This script needs the internet, or a mirror that pip knows. Once it has installed, nothing else does: on a cluster,
# run it on a login node, in a checkout that the other nodes see.
#
# From the environment:
# SETUP       shell commands to run first, such as: module load python
# PYTHON      interpreter for making .venv, 3.10 or newer; default: python3, else the newest python3.x
# NO_VENV=1   make and install nothing, and use PYTHON (or python3) as it is: for clusters, conda and containers. PYTHON
#             may have arguments then: PYTHON="apptainer exec --nv image.sif python"
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# python_version COMMAND...: prints "3 11"; fails if COMMAND is no Python.
python_version() {
    "$@" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null
}

# is_recent VERSION: whether "MAJOR MINOR" is 3.10 or newer.
is_recent() {
    local major minor
    read -r major minor <<<"$1"
    ((major > 3 || (major == 3 && minor >= 10)))
}

# Sets PYTHON_COMMAND to an interpreter that is recent enough: that of PYTHON, else python3, else a newer python3.x.
find_python() {
    local candidates=(python3 python3.{19..10}) candidate version old=""
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        PYTHON=$candidate
        version=$(choose_python "$ROOT" 2>/dev/null && python_version "${PYTHON_COMMAND[@]}") || continue
        if is_recent "$version"; then
            choose_python "$ROOT"
            return
        fi
        old=${old:-"$candidate is Python ${version/ /.}, too old"}
    done
    if ((${#candidates[@]} == 1)); then
        die "${old:-PYTHON=$PYTHON is no Python interpreter}: set PYTHON to one of version 3.10 or newer"
    fi
    die "${old:-no python3 found}: install Python 3.10 or newer, or set PYTHON to where it is"
}

# install_state: a hash of what an install depends on: the version of Python, and the lists of requirements, which name
# one another.
install_state() {
    "${PYTHON_COMMAND[@]}" -c 'import hashlib, pathlib, sys
lists = b"".join(path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).glob("requirements*.txt")))
print(hashlib.sha256(repr(sys.version_info[:2]).encode() + lists).hexdigest())' "$ROOT"
}

# Makes .venv unless there is one that works, and sets PYTHON_COMMAND to its interpreter.
make_venv() {
    local venv=$ROOT/.venv version=""
    version=$(python_version "$venv/bin/python") || true
    if [[ -z $version ]]; then
        find_python
        "${PYTHON_COMMAND[@]}" -c 'import venv, ensurepip' 2>/dev/null || die "${PYTHON_COMMAND[*]} lacks the modules venv and ensurepip:" \
            "install them (Debian, Ubuntu: apt install python3-venv), or set NO_VENV=1 to use it as it is"
        echo "Making $venv with ${PYTHON_COMMAND[*]}"
        # --clear removes the remains of an interrupted run.
        "${PYTHON_COMMAND[@]}" -m venv --clear "$venv" || die "could not make $venv (see above)"
    else
        is_recent "$version" || die "$venv has Python ${version/ /.}, too old: remove it and start again"
    fi
    PYTHON_COMMAND=("$venv/bin/python")
    # An environment from another tool, or an interrupted run, may have an interpreter and no pip.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null ||
        die "$venv has no pip: remove it and start again"
}

# install FILE: pip installs FILE into .venv, unless it has done so before. The stamp comes last, so that the next call
# repeats an interrupted install.
install() {
    local stamp=$ROOT/.venv/.installed-$1 state
    state=$(install_state)
    [[ ! -f $stamp || $(<"$stamp") != "$state" ]] || return 0
    echo "Installing $1 into $ROOT/.venv"
    # PIP_USER=0: a user-wide `pip config` asking for --user fails in a virtual environment.
    PIP_USER=0 "${PYTHON_COMMAND[@]}" -m pip install --disable-pip-version-check -r "$ROOT/$1" ||
        die "could not install $1 (see above); run it again to try again"
    printf '%s\n' "$state" >"$stamp"
}

# setup_env [dev]: sets PYTHON_COMMAND and PATH.
setup_env() {
    run_setup
    local files=(requirements.txt) file
    [[ ${1:-} != dev ]] || files+=(requirements-dev.txt)
    if [[ ${NO_VENV:-0} == 1 ]]; then
        find_python
    else
        make_venv
        for file in "${files[@]}"; do install "$file"; done
        export VIRTUAL_ENV=$ROOT/.venv
    fi
    export PATH="$(dirname -- "${PYTHON_COMMAND[0]}"):$PATH"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    case ${1:-} in
    "" | dev) ;;
    -h | --help)
        show_help
        exit 0
        ;;
    *) die "unknown argument $1: it takes nothing, or dev" ;;
    esac
    setup_env "$@"
    echo "Ready: ${PYTHON_COMMAND[*]}"
fi
