# Functions that the launch scripts share, and ROOT, the checkout of this file. Scripts source it; nobody runs it.
#
# The callers use `set -euo pipefail`. `die` ends them with one line that says what to do.

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

# The five published variants in the order of the paper's table; any other configs/groupmixformer_<name>.yaml is a
# valid VARIANT too (digits, or one of your own).
PUBLISHED_VARIANTS=(miny tiny small base large)

# The scripts set neither OMP_NUM_THREADS nor NCCL_*. torchrun sets OMP_NUM_THREADS to 1 for several processes, which
# suits training: the work is on the GPU or in loader processes. A single process on a CPU uses all cores.

die() {
    printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
    exit 1
}

# Prints the comment block at the top of the running script as its help.
show_help() {
    sed -n '2,/^[^#]/{ /^##*SBATCH/d; s/^# \{0,1\}//p; }' "$0"
}

# split_arguments MOST "$@": arguments before `--` go to POSITIONAL (at most MOST), those after it to EXTRA.
split_arguments() {
    local most=$1
    shift
    POSITIONAL=()
    EXTRA=()
    while (($#)); do
        case $1 in
        --)
            shift
            EXTRA=("$@")
            break
            ;;
        -h | --help)
            show_help
            exit 0
            ;;
        -*) die "unknown flag $1: flags for train.py and test.py go after --, as in: $(basename -- "$0") -- $1" ;;
        esac
        POSITIONAL+=("$1")
        shift
    done
    ((${#POSITIONAL[@]} <= most)) || die "too many arguments: ${POSITIONAL[*]} (--help shows what it takes)"
}

# run_setup: runs the commands in SETUP. They may set the other variables, and need not be fit for `set -eu`.
run_setup() {
    [[ -n ${SETUP:-} ]] || return 0
    set +euo pipefail
    eval "$SETUP"
    local code=$?
    set -euo pipefail
    ((code == 0)) || die "SETUP: its last command ended with code $code: $SETUP"
}

# choose_python CHECKOUT: sets the array PYTHON_COMMAND to the words of PYTHON, else to the checkout's .venv, else to
# python3. Quotes in PYTHON hold a word together. A path of the first word becomes absolute: the callers change folders.
choose_python() {
    local path
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON_COMMAND=(python3)
        [[ ! -x $1/.venv/bin/python ]] || PYTHON_COMMAND=("$1/.venv/bin/python")
    elif command -v -- "$PYTHON" >/dev/null; then
        PYTHON_COMMAND=("$PYTHON") # a path with a space
    else
        mapfile -d '' -t PYTHON_COMMAND < <(xargs printf '%s\0' <<<"$PYTHON" 2>/dev/null)
    fi
    path=$(command -v -- "${PYTHON_COMMAND[0]:-}") || die "PYTHON=${PYTHON:-python3}: no such program;$(advise_setup)"
    [[ $path == /* ]] || path=$PWD/$path
    PYTHON_COMMAND[0]=$path
}

# Prints what helps where there is no Python with the requirements.
advise_setup() {
    local script=$ROOT/launch_scripts/setup_env.sh
    [[ ! -f $script ]] || printf ' run bash %q, or' "$script"
    printf ' set PYTHON'
}

# choose_config CHECKOUT: sets CFG, unless the environment did, to the YAML of VARIANT.
choose_config() {
    local names
    if [[ -z ${CFG:-} ]]; then
        CFG=configs/groupmixformer_${VARIANT:-small}.yaml
        if [[ ! -f $1/$CFG ]]; then
            names=$(cd -- "$1" && ls configs/groupmixformer_*.yaml 2>/dev/null) || die "no configs/groupmixformer_*.yaml in $1"
            names=$(sed 's/.*groupmixformer_\(.*\)\.yaml/\1/' <<<"$names")
            die "no variant ${VARIANT:-small}; valid ones: ${names//$'\n'/ }"
        fi
    fi
    [[ -f $CFG || -f $1/$CFG ]] || die "no such config: $CFG (relative paths are taken from $1)"
}

# choose_gpus: sets GPUS, unless the environment did, to the number of GPUs that torch finds, or to 1 without GPUs.
choose_gpus() {
    if [[ -z ${GPUS:-} ]]; then
        GPUS=$("${PYTHON_COMMAND[@]}" -c 'import torch; print(torch.cuda.device_count() or 1)' 2>/dev/null) ||
            die "${PYTHON_COMMAND[*]} cannot import torch;$(advise_setup)"
    fi
    [[ $GPUS =~ ^[1-9][0-9]*$ ]] || die "GPUS is the number of processes to start, at least 1, not '$GPUS'"
}

# run_distributed SCRIPT "$@": the work of run_train.sh and run_eval.sh, which differ in SCRIPT only. Replaces this shell.
# multi_machine_start.py starts a training, because torchrun alone turns exit code 75 of a saved run into 1.
# An evaluation by one process runs without torchrun, whose traceback would hide the cause of a failure.
run_distributed() {
    local script=$1 code own launcher
    shift
    split_arguments 2 "$@"
    code=$(CDPATH='' cd -- "${POSITIONAL[1]:-$ROOT}" && pwd) || die "no such checkout: ${POSITIONAL[1]}"
    [[ -f $code/$script ]] || die "no $script in $code"
    [[ $script != train.py || -f $code/multi_machine_start.py ]] || die "no multi_machine_start.py in $code"
    if ((${#POSITIONAL[@]})); then
        # <root> is relative to the caller's folder; the cd below changes it.
        [[ ${POSITIONAL[0]} == /* ]] || POSITIONAL[0]=$PWD/${POSITIONAL[0]}
        # Kaggle's val/ is flat; python -m tools.prepare kaggle makes class folders of it, there.
        DATA_PATH=${POSITIONAL[0]}/data/imagenet
        [[ -d $DATA_PATH/val ]] || DATA_PATH=${POSITIONAL[0]}/data/ILSVRC/Data/CLS-LOC
    fi
    run_setup
    choose_python "$code"
    choose_config "$code"
    choose_gpus
    own=()
    [[ -z ${BATCH_SIZE:-} ]] || own+=(--batch-size "$BATCH_SIZE")
    [[ -z ${TAG:-} ]] || own+=(--tag "$TAG")
    cd -- "$code"
    # exec: signals reach the launcher itself, and no shell stays behind.
    if [[ $script == train.py ]]; then
        exec "${PYTHON_COMMAND[@]}" multi_machine_start.py --machine_num 1 --np "$GPUS" --config "$CFG" \
            --data_path "${DATA_PATH:-./datasets/imagenet}" --output "${OUTPUT:-./output}" -- "${own[@]}" "${EXTRA[@]}"
    fi
    launcher=()
    if ((GPUS == 1)); then
        unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE # another launcher may have set them
    else
        launcher=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
        # torchrun would undo nohup, for itself and its workers: by default it handles SIGHUP.
        [[ -z $(trap -p HUP) ]] || export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGQUIT}"
    fi
    exec "${PYTHON_COMMAND[@]}" "${launcher[@]}" "$script" --cfg "$CFG" \
        --data-path "${DATA_PATH:-./datasets/imagenet}" --output "${OUTPUT:-./output}" "${own[@]}" "${EXTRA[@]}"
}

# run_measurement FLAG "$@": the work of run_cal_flops.sh and test_throughput.sh: test.py FLAG for one variant or all.
run_measurement() {
    local flag=$1 variant
    shift
    split_arguments 1 "$@"
    run_setup
    choose_python "$ROOT"
    VARIANT=${POSITIONAL[0]:-${VARIANT:-small}}
    # A variant that is named on the command line wins over CFG from the environment.
    ((${#POSITIONAL[@]} == 0)) || CFG=
    cd -- "$ROOT"
    if [[ $VARIANT == all && -z ${CFG:-} ]]; then
        for variant in "${PUBLISHED_VARIANTS[@]}"; do
            "${PYTHON_COMMAND[@]}" test.py --cfg "configs/groupmixformer_$variant.yaml" "$flag" "${EXTRA[@]}"
        done
    else
        choose_config "$ROOT"
        exec "${PYTHON_COMMAND[@]}" test.py --cfg "$CFG" "$flag" "${EXTRA[@]}"
    fi
}
