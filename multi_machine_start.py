#!/usr/bin/env python3
"""Start this machine's share of a training run: check the arguments, then start torchrun and look after it.

Run it on every machine, with the same arguments except for the node's rank:

    python multi_machine_start.py --machine_num 2 --node_rank 0 --ip 10.0.0.1 --main_port 29500 --np 8 \\
        --config configs/groupmixformer_small.yaml --data_path ~/imagenet --output output --tag small \\
        -- --opts TRAIN.EPOCHS 100

Everything after `--` goes to train.py. Without --node_rank, the first of these that is set says which node this is:
SLURM_NODEID, NODE_RANK, PET_NODE_RANK, GROUP_RANK, MACHINE_RANK. (SLURM_PROCID counts tasks, not nodes.)

SIGTERM, SIGINT and SIGUSR1 are forwarded, so that train.py can save and end. After a fault torchrun is started again,
up to --retries times, and train.py continues from its last good checkpoint. After an hour of training the count starts
anew. A mistake that train.py finds before it trains is not tried again.

Exit codes: 0, the run is done; 75, it was stopped and saved: start it again; 2, a mistake, in these arguments or found
by train.py; 128 + n, stopped by signal n without saving; else torchrun's own.
"""

import argparse
import contextlib
import ctypes
import difflib
import os
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EX_TEMPFAIL = 75  # sysexits.h: "try again later"; what train.py ends with once it has saved on request
EX_MISTAKE = 2  # what train.py and torchrun end with before they begin, where the arguments, data or recipe are wrong
# A run that lasted so long before a fault has got somewhere: days of training may meet more faults than --retries.
RENEWAL_SECONDS = 3600
NODE_RANK_VARIABLES = ("SLURM_NODEID", "NODE_RANK", "PET_NODE_RANK", "GROUP_RANK", "MACHINE_RANK")

# torchrun ends with 1 whatever its workers ended with. So a worker that ends on purpose writes its exit code, as a
# decimal number, to the file that this variable names. The file lies in a folder of this launcher's own, so the
# variable also tells its descendants from all other processes.
EXIT_FILE_VARIABLE = "LAUNCHER_EXIT_FILE"
# The worker that fails first leaves its line in the file that this one names: torchrun's own report, of fifty lines,
# comes after the line in the terminal, and does not hold it.
CAUSE_FILE_VARIABLE = "LAUNCHER_CAUSE_FILE"

# What torchrun needs in its environment. Its own variables, so that a torchrun which does not know one ignores it.
TORCHRUN_DEFAULTS = {
    # A signal that is not named here would kill torchrun instead of reaching the workers.
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    # Seconds from a forwarded signal to SIGKILL. The default of 30 is short for a checkpoint on a slow disk, and SLURM
    # gives 120 (slurm_train.sh).
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90",
}
RENDEZVOUS_SECONDS = 900  # how long torchrun waits for the other nodes unless it is told
# Seconds beyond that until torchrun itself is taken to hang.
SHUTDOWN_MARGIN_SECONDS = 15

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class UsageError(Exception):
    """What the user has to change, in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes --two_words as --two-words too, like torchrun."""

    def add(self, flag: str, **kwargs) -> None:
        self.add_argument(flag, *({flag[:2] + flag[2:].replace("_", "-")} - {flag}), **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(minimum: int, maximum: int | None = None):
    """An argparse type: a whole number within these bounds."""
    bounds = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"

    def parse(text: str) -> int:
        # isdecimal: int() would also take "1_0" and " 1".
        if not text.isdecimal() or int(text) < minimum or (maximum is not None and int(text) > maximum):
            raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, not {text!r}")
        return int(text)

    return parse


def device_list(text: str) -> list[str]:
    """An argparse type: the devices in a list such as `0,1,2,3`."""
    devices = [device.strip() for device in text.split(",")]
    if "" in devices or len(set(devices)) < len(devices):
        raise argparse.ArgumentTypeError(f"must be a list of different GPUs such as 0,1,2,3, not {text!r}")
    return devices


def address(text: str) -> str:
    """An argparse type: a host name or an IP address."""
    if not text or text.startswith("-") or any(c.isspace() for c in text):
        raise argparse.ArgumentTypeError(f"must be a host name or an IP address, not {text!r}")
    return text


def build_parser() -> OneLineParser:
    # Abbreviations are off: a flag that is added later must not change what an old script means.
    parser = OneLineParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add("--machine_num", type=whole_number(1), default=1, help="number of nodes (default: 1)")
    parser.add("--node_rank", type=whole_number(0), help="which of them this is, from 0 (default: see above)")
    parser.add(
        "--np", type=whole_number(1), help="processes on this node, one per GPU (default: as many as there are GPUs)"
    )
    parser.add("--ip", type=address, help="address of node 0; needed with several nodes")
    parser.add(
        "--main_port",
        type=whole_number(1, 65535),
        help="port on node 0 (default: 29500; with one node, any free port)",
    )
    parser.add("--vis_gpu", type=device_list, help="GPUs to use on this node, such as 0,1,2,3 (default: all)")
    parser.add("--code_path", default=str(Path(__file__).parent), help="checkout to run in (default: this one)")
    parser.add(
        "--config",
        default="configs/groupmixformer_small.yaml",
        help="YAML file; this and the next two are relative to the checkout (default: %(default)s)",
    )
    parser.add("--data_path", default="./datasets/imagenet", help="folder with train/ and val/ (default: %(default)s)")
    parser.add("--output", default="./output", help="folder for runs, shared by all nodes (default: %(default)s)")
    parser.add("--tag", help="name of the run (default: the config's)")
    parser.add("--batchsize", type=whole_number(1), help="images per GPU (default: the config's)")
    parser.add("--retries", type=whole_number(0), default=0, help="times to start again after a fault (default: 0)")
    parser.add(
        "--retry_wait",
        type=whole_number(0),
        default=10,
        help="seconds before that, in which the other nodes notice the fault (default: 10)",
    )
    parser.add(
        "--rendezvous_timeout",
        type=whole_number(1),
        help=f"seconds that the nodes wait for each other to start (default: torchrun's {RENDEZVOUS_SECONDS})",
    )
    parser.add("--dry_run", action="store_true", help="print the command that would be run, and end")
    return parser


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split argv into this script's arguments, checked and completed, and those of train.py (all after `--`)."""
    parser = build_parser()
    cut = argv.index("--") if "--" in argv else len(argv)
    own, train_arguments = argv[:cut], argv[cut + 1 :]
    args, unknown = parser.parse_known_args(own)
    try:
        if unknown:
            raise UsageError(describe_unknown(unknown[0], parser))
        complete_arguments(args, os.environ)
    except UsageError as error:
        parser.error(str(error))
    return args, train_arguments


def describe_unknown(argument: str, parser: OneLineParser) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}"
    flag = argument.split("=")[0]
    flags = [option for action in parser._actions for option in action.option_strings]
    nearest = difflib.get_close_matches(flag, flags, n=1)
    suggestion = f"did you mean {nearest[0]}? " if nearest else ""
    return f"unknown flag {flag} ({suggestion}Flags for train.py go after --)"


def complete_arguments(args: argparse.Namespace, environ) -> None:
    """Fill in node_rank, ip and np, and check what argparse cannot; raises UsageError."""
    code_path = Path(args.code_path)
    if not code_path.is_dir():
        raise UsageError(f"--code_path: no such folder: {args.code_path}")
    if not (code_path / "train.py").is_file():
        raise UsageError(f"--code_path: no train.py in {args.code_path}")
    if not (code_path / args.config).is_file():
        raise UsageError(f"--config: no such file: {args.config} (relative paths are taken from {args.code_path})")
    if args.machine_num > 1 and args.ip is None:
        raise UsageError("--ip: with several nodes, the address of node 0 is needed")
    if environ.get("SLURM_LOCALID", "0") != "0":
        # Each would start a torchrun of its own, with all processes of the node.
        raise UsageError("SLURM started several tasks on this node; it needs one (--ntasks-per-node=1)")
    args.node_rank = resolve_node_rank(args.node_rank, args.machine_num, environ)
    if args.np is None:
        args.np = len(args.vis_gpu) if args.vis_gpu else count_gpus()
    if args.vis_gpu and len(args.vis_gpu) < args.np:
        raise UsageError(f"--vis_gpu: names {len(args.vis_gpu)} GPUs for --np {args.np} processes")


def resolve_node_rank(flag: int | None, machine_num: int, environ) -> int:
    """This node's rank: the flag, else the first of NODE_RANK_VARIABLES that is set; raises UsageError.

    With a single node it is 0 and the variables are not looked at: such a run may well be one of many in a SLURM job.
    """
    source, rank = "--node_rank", flag
    if flag is None and machine_num == 1:
        return 0
    if flag is None:
        source = next((name for name in NODE_RANK_VARIABLES if environ.get(name)), None)
        if source is None:
            names = ", ".join(NODE_RANK_VARIABLES)
            raise UsageError(f"--node_rank: which of the {machine_num} nodes is this? Give it, or set one of {names}")
        if not environ[source].isdecimal():
            raise UsageError(f"{source}: must be a whole number from 0 to {machine_num - 1}, not {environ[source]!r}")
        rank = int(environ[source])
    if rank >= machine_num:
        raise UsageError(
            f"{source}: {rank} is out of range: with --machine_num {machine_num} it is 0 to {machine_num - 1}"
        )
    return rank


def count_gpus() -> int:
    import torch  # takes seconds: only where the number was not given

    return torch.cuda.device_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def build_command(args: argparse.Namespace, train_arguments: list[str]) -> list[str]:
    """The torchrun command line of this node, an argument an item; it is never given to a shell."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", str(args.machine_num), "--node_rank", str(args.node_rank), "--nproc_per_node", str(args.np)]
    if args.machine_num == 1 and args.main_port is None:
        command += ["--standalone"]  # a free port: several runs may share one machine
    else:
        host, port = meeting_point(args)
        command += ["--master_addr", host, "--master_port", str(port)]
        if args.rendezvous_timeout is not None:
            command += ["--rdzv_conf", f"timeout={args.rendezvous_timeout}"]

    # `--flag=value`, so that a value that starts with a dash is not taken for a flag.
    train = [f"--cfg={args.config}", f"--data-path={args.data_path}", f"--output={args.output}"]
    train += [f"--tag={args.tag}"] if args.tag is not None else []
    train += [f"--batch-size={args.batchsize}"] if args.batchsize is not None else []
    return [*command, "train.py", *map(keep_literal, train + train_arguments)]


def meeting_point(args: argparse.Namespace) -> tuple[str, int]:
    """Where the nodes meet."""
    return args.ip or "127.0.0.1", args.main_port or 29500


def keep_literal(argument: str) -> str:
    """torchrun expands `$$` and `$local_rank` in a worker's arguments: double the dollars where that would happen."""
    expanded = string.Template(argument).safe_substitute(local_rank="")
    return argument if expanded == argument else argument.replace("$", "$$")


def torchrun_environment(args: argparse.Namespace, environ) -> dict[str, str]:
    """The variables to add to the environment; only --vis_gpu overrides what the user has set."""
    added = {name: value for name, value in TORCHRUN_DEFAULTS.items() if name not in environ}
    if args.vis_gpu:
        added["CUDA_VISIBLE_DEVICES"] = ",".join(args.vis_gpu)
    return added


def format_command(command: list[str], environment: dict[str, str], code_path: str) -> str:
    """One line that does in a shell what this script does without."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    return shlex.join(["env", "-C", str(Path(code_path).resolve()), *settings, *command])


# ---------------------------------------------------------------------------------------------------------------------
# Supervision
# ---------------------------------------------------------------------------------------------------------------------


def supervise(args: argparse.Namespace, command: list[str], environment: dict[str, str]) -> int:
    """Run torchrun to its end, again after a fault while retries are left; returns the exit code of this script."""
    node = f"node {args.node_rank}"
    # A signal that this process was started with ignored (nohup, a shell's background job) stays ignored.
    stop_signals = {s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if signal.getsignal(s) != signal.SIG_IGN}
    # Signals are blocked and taken from the queue one by one, rather than handled whenever they come: none is lost
    # between two instructions. SIGCHLD says that torchrun has ended.
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, {*stop_signals, signal.SIGCHLD})
    try:
        with tempfile.TemporaryDirectory(prefix="groupmixformer-") as folder:
            exit_file, cause_file = Path(folder, "exit_code"), Path(folder, "cause")
            # torchrun makes a folder in there for every start of workers; without it, one in /tmp that stays.
            logs = Path(folder, "logs")
            files = {EXIT_FILE_VARIABLE: str(exit_file), CAUSE_FILE_VARIABLE: str(cause_file)}
            environment = {"PET_LOG_DIR": str(logs), **os.environ, **environment, **files}
            retries_left = args.retries
            while True:
                began = time.monotonic()
                code, stopped_by = run_once(command, args.code_path, environment, stop_signals, mask_before)
                end_leftovers(exit_file)
                if code != 0:
                    code = read_exit_code(exit_file) or code
                exit_file.unlink(missing_ok=True)
                if code == EX_TEMPFAIL:
                    log(f"{node}: the run has saved and stopped; start it again to continue")
                if code in (0, EX_TEMPFAIL):
                    return code
                if stopped_by is not None:
                    log(f"{node}: ended by {signal.Signals(stopped_by).name} before the run had saved")
                    return 128 + stopped_by
                started = environment["PET_LOG_DIR"] != str(logs) or any(logs.glob("*/attempt_*"))
                cause = read_cause(cause_file) if started else why_not_started(args)
                fault = f"{node}: torchrun ended with code {code}" + (f": {cause}" if cause else "")
                cause_file.unlink(missing_ok=True)
                shutil.rmtree(logs, ignore_errors=True)
                if code == EX_MISTAKE:
                    log(f"{fault}; to be mended first" if args.retries else fault)
                    return code
                if time.monotonic() - began >= RENEWAL_SECONDS:
                    retries_left = args.retries
                if retries_left == 0:
                    log(f"{fault}; no retries left" if args.retries else fault)
                    return code
                log(f"{fault}; starting it again in {args.retry_wait} s, retries left: {retries_left}")
                pending = signal.sigtimedwait(stop_signals, args.retry_wait)
                if pending is not None:
                    return 128 + pending.si_signo
                retries_left -= 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)


def run_once(command, code_path, environment, stop_signals, mask_before) -> tuple[int, int | None]:
    """Start torchrun and wait for it, forwarding signals; returns its exit code and the first of them, if any came."""
    shutdown_seconds = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + SHUTDOWN_MARGIN_SECONDS
    launcher_pid = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare_child():
        # If this launcher is killed, torchrun gets SIGTERM, which it passes on to its workers.
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != launcher_pid:
                os._exit(1)  # it was killed before the line above
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)

    # A session of its own: Ctrl-C in a terminal reaches this process only, and torchrun once, through it.
    child = subprocess.Popen(command, cwd=code_path, env=environment, start_new_session=True, preexec_fn=prepare_child)
    stopped_by, deadline = None, float("inf")
    while child.poll() is None:
        if deadline == float("inf"):
            signum = signal.sigwaitinfo({*stop_signals, signal.SIGCHLD}).si_signo
        else:
            arrived = signal.sigtimedwait({*stop_signals, signal.SIGCHLD}, max(0, deadline - time.monotonic()))
            signum = arrived.si_signo if arrived else signal.SIGKILL
        if signum != signal.SIGCHLD:
            child.send_signal(signum)
        if signum in stop_signals:
            stopped_by = stopped_by or signum
            deadline = min(deadline, time.monotonic() + shutdown_seconds)
    code = child.returncode
    return (code if code >= 0 else 128 - code), stopped_by


def why_not_started(args: argparse.Namespace) -> str:
    """The likeliest cause, in words, where torchrun has ended without having started a worker."""
    host, port = meeting_point(args)
    if args.node_rank == 0 and (args.machine_num > 1 or args.main_port is not None):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                return f"port {port} of this node cannot be used ({error.strerror}); choose another --main_port"
    if args.machine_num > 1:
        seconds = args.rendezvous_timeout or RENDEZVOUS_SECONDS
        return (
            f"the {args.machine_num} nodes have not met within {seconds} s at {host}:{port}; all of them have to be "
            "started, with the same --machine_num, --ip and --main_port, and --ip has to be an address of node 0"
        )
    return "no worker was started"


def read_exit_code(exit_file: Path) -> int | None:
    """The exit code that a worker left, if one did."""
    try:
        return int(exit_file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def read_cause(cause_file: Path) -> str:
    """The line that the first worker to fail left, if one did."""
    try:
        return cause_file.read_text(errors="replace").strip()
    except OSError:
        return ""


def end_leftovers(exit_file: Path, seconds: float = 10) -> None:
    """Kill the workers that outlived torchrun, because it was killed itself: they would hold GPUs and the run folder.

    torchrun gives each worker a session of its own, so they are not in its process group. They are known by
    EXIT_FILE_VARIABLE in their environment, with a value that only descendants of this launcher have.
    """
    mark = f"{EXIT_FILE_VARIABLE}={exit_file}".encode()
    deadline = time.monotonic() + seconds
    while leftovers := find_marked(mark):
        for pid in leftovers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            log(f"processes {leftovers} do not end, not even when killed")
            return
        time.sleep(0.05)


def find_marked(mark: bytes) -> list[int]:
    """The processes with this entry in their environment; one that has ended has no environment any more."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or just ended
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def log(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading it any more
        print(f"multi_machine_start.py: {message}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    args, train_arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    command = build_command(args, train_arguments)
    environment = torchrun_environment(args, os.environ)
    line = format_command(command, environment, args.code_path)
    if args.dry_run:
        print(line)
        return 0
    log(f"node {args.node_rank} of {args.machine_num}: {line}")
    return supervise(args, command, environment)


if __name__ == "__main__":
    sys.exit(main())
