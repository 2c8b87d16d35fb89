#!/usr/bin/env python3
"""Start this machine's share of a training run: check the arguments, start torchrun and supervise it.

Run it on every machine, with the same arguments except for the node's rank:

    python multi_machine_start.py --machine_num 2 --node_rank 0 --ip 10.0.0.1 --main_port 29500 --np 8 \\
        --config configs/groupmixformer_small.yaml --data_path ~/imagenet --output output --tag small \\
        -- <flags of train.py>

Everything after `--` goes to train.py. With several nodes, environment variables stand in for flags that are missing;
the first one that is set counts:

    --node_rank   SLURM_NODEID, NODE_RANK, PET_NODE_RANK, GROUP_RANK, MACHINE_RANK
    --ip          MASTER_ADDR, PET_MASTER_ADDR
    --main_port   MASTER_PORT, PET_MASTER_PORT

SLURM_PROCID counts tasks, not nodes, and is not read.

Process 0, on node 0, writes the checkpoints, and reads them when the run continues. Nodes need no shared disk as long
as node 0 stays the same machine. SLURM may give a requeued job another first node: there --output must be a folder that
all nodes share. Nodes need no internet.

The launcher forwards SIGTERM, SIGINT, SIGHUP and SIGUSR1, so that train.py can save and end. A signal that it was
started with ignored stays ignored, for torchrun and train.py too: under nohup, a lost connection ends nothing.

After a fault it starts torchrun again, up to --retries times, and train.py continues from its last good checkpoint.
After an hour of training the count starts again from 0. The launcher does not retry a mistake that train.py finds
before it trains.

The last line names the cause of a failure. Exit codes: 0: the run is done. 75: it was stopped and has saved; start it
again to continue. 2: a mistake in these arguments, or one that train.py found. 128 + n: stopped by signal n without
saving. Any other: torchrun's own.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import shlex
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from configs import UserError
from configs.commands import CommandParser, command
from configs.errors import EXIT_MISTAKE, EXIT_STOPPED

RENEWAL_SECONDS = (
    3600  # a start that lasted so long made progress: days of training may meet more faults than --retries
)
RENDEZVOUS_SECONDS = 900  # torchrun's own limit of waiting for the other nodes
NODE_RANK_VARIABLES = ("SLURM_NODEID", "NODE_RANK", "PET_NODE_RANK", "GROUP_RANK", "MACHINE_RANK")
ADDRESS_VARIABLES = ("MASTER_ADDR", "PET_MASTER_ADDR")
PORT_VARIABLES = ("MASTER_PORT", "PET_MASTER_PORT")
DEFAULT_PORT = 29500
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # train.py saves, and ends

# Seconds from a signal that torchrun forwards to SIGKILL. Its default of 30 is short for a checkpoint on a slow disk.
# SLURM gives 120 (slurm_train.sh).
SHUTDOWN_SECONDS = 90

# What train.py reads: flag or configuration key -> the flag's name in messages.
PATHS_TO_READ = {"--data-path": "--data_path", "DATA.DATA_PATH": "--data_path", "--cfg": "--cfg"}
PATHS_TO_READ |= {"--pretrained": "--pretrained", "MODEL.PRETRAINED": "--pretrained"}
PATHS_TO_READ |= {"--resume": "--resume", "MODEL.RESUME": "--resume"}


# --- arguments


def whole_number(minimum: int, maximum: float = math.inf):
    """An argparse type: a whole number within these bounds."""

    def parse(text: str) -> int:
        # isdecimal: int() would also take "1_0" and " 1".
        if not text.isdecimal() or not minimum <= int(text) <= maximum:
            bounds = f"of at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, not {text!r}")
        return int(text)

    return parse


def build_parser() -> CommandParser:
    parser = CommandParser("multi_machine_start", __doc__)
    parser.prog = Path(__file__).name

    def add(group, flag: str, **kwargs) -> None:
        """Takes --two_words as --two-words too, like torchrun."""
        group.add_argument(flag, *({flag[:2] + flag[2:].replace("_", "-")} - {flag}), **kwargs)

    count, positive, port = whole_number(0), whole_number(1), whole_number(1, 65535)
    nodes = parser.add_argument_group("nodes and processes")
    add(nodes, "--machine_num", type=positive, default=1, metavar="N", help="number of nodes")
    add(nodes, "--node_rank", type=count, metavar="N", help="rank of this node, from 0 (default: see above)")
    add(nodes, "--ip", metavar="ADDRESS", help="address of node 0; needed with several nodes (default: see above)")
    text = f"port on node 0 (default: see above, else {DEFAULT_PORT}; with one node, any free port)"
    add(nodes, "--main_port", type=port, metavar="PORT", help=text)
    add(nodes, "--np", type=positive, metavar="N", help="processes here, one per GPU (default: the number of GPUs)")
    text = "GPUs to use on this node, such as 0,1,2,3 (default: all)"
    add(nodes, "--vis_gpu", type=lambda text: text.split(","), metavar="LIST", help=text)
    run = parser.add_argument_group("run", "Relative paths start at the checkout.")
    here, text = str(Path(__file__).parent), "checkout to run in (default: the one of this file)"
    add(run, "--code_path", default=here, metavar="DIR", help=text)
    add(run, "--config", default="configs/groupmixformer_small.yaml", metavar="FILE", help="YAML file")
    add(run, "--data_path", default="./datasets/imagenet", metavar="DIR", help="folder with train/ and val/")
    add(run, "--output", default="./output", metavar="DIR", help="folder for runs; see above where it must be")
    add(run, "--tag", metavar="NAME", help="name of the run (default: the config's)")
    add(run, "--batchsize", type=positive, metavar="N", help="images per GPU (default: the config's)")
    faults = parser.add_argument_group("faults")
    add(faults, "--retries", type=count, default=0, metavar="N", help="how often to start again after a fault")
    text = "seconds before that; the others notice the fault"
    add(faults, "--retry_wait", type=count, default=10, metavar="SECONDS", help=text)
    text = f"seconds to wait for other nodes (default: {RENDEZVOUS_SECONDS})"
    add(faults, "--rendezvous_timeout", type=positive, metavar="SECONDS", help=text)
    text = "print the command instead of running it, and name the paths in it that are not on this machine"
    add(parser, "--dry_run", action="store_true", help=text)
    return parser


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split argv into this script's arguments, checked and completed, and those of train.py (all after `--`)."""
    parser = build_parser()
    cut = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:cut])
    if unknown:
        parser.error(f"unknown argument {unknown[0].split('=')[0]}; flags of train.py go after --; see --help")
    complete_arguments(args, os.environ)
    return args, argv[cut + 1 :]


def complete_arguments(args: argparse.Namespace, environ) -> None:
    """Fill in what has no fixed default, and check what argparse cannot; raises UserError."""
    code_path = Path(args.code_path)
    if not code_path.is_dir():
        raise UserError(f"--code_path: no such folder: {args.code_path}")
    if not (code_path / "train.py").is_file():
        raise UserError(f"--code_path: no train.py in {args.code_path}")
    if not (code_path / args.config).is_file():
        raise UserError(f"--config: no such file: {args.config} (relative paths are taken from {args.code_path})")
    if args.machine_num > 1:
        resolve_address(args, environ)
    if environ.get("SLURM_LOCALID", "0") != "0":
        # Each would start a torchrun of its own, with all processes of the node.
        raise UserError("SLURM started several tasks on this node; it needs one (--ntasks-per-node=1)")
    args.node_rank = resolve_node_rank(args.node_rank, args.machine_num, environ)
    if args.np is None:
        if not args.vis_gpu:
            import torch  # takes seconds: only where the user gives no number

        args.np = len(args.vis_gpu) if args.vis_gpu else torch.cuda.device_count() or 1
    if args.vis_gpu and len(args.vis_gpu) < args.np:
        raise UserError(f"--vis_gpu: names {len(args.vis_gpu)} GPUs for --np {args.np} processes")
    args.standalone = args.machine_num == 1 and args.main_port is None
    args.ip, args.main_port = args.ip or "127.0.0.1", args.main_port or DEFAULT_PORT


def first_set(names: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """The first of these variables that is set and not empty."""
    return next((name for name in names if environ.get(name)), None)


def resolve_address(args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Fill in --ip and --main_port of several nodes from the environment; raises UserError.

    A single node does not look there: the variables may belong to the job that it is a part of.
    """
    if not args.ip:
        name = first_set(ADDRESS_VARIABLES, environ)
        if name is None:
            raise UserError(f"--ip: needed with {args.machine_num} nodes; give node 0's address, or set MASTER_ADDR")
        args.ip = environ[name]
    name = first_set(PORT_VARIABLES, environ)
    if args.main_port is None and name is not None:
        try:
            args.main_port = whole_number(1, 65535)(environ[name])
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name}: {error}") from None


def resolve_node_rank(flag: int | None, machine_num: int, environ) -> int:
    """This node's rank: the flag, else the first of NODE_RANK_VARIABLES that is set; raises UserError.

    A single node has rank 0 whatever the variables say: it may be one run of many in a SLURM job.
    """
    source, rank = "--node_rank", flag
    if flag is None and machine_num == 1:
        return 0
    if flag is None:
        source = first_set(NODE_RANK_VARIABLES, environ)
        if source is None:
            names = ", ".join(NODE_RANK_VARIABLES)
            raise UserError(f"--node_rank: needed with {machine_num} nodes; give it, or set one of {names}")
        if not environ[source].isdecimal():
            raise UserError(f"{source}: must be a whole number from 0 to {machine_num - 1}, not {environ[source]!r}")
        rank = int(environ[source])
    if rank >= machine_num:
        raise UserError(f"{source}: {rank} is out of range; {machine_num} nodes have the ranks 0 to {machine_num - 1}")
    return rank


# --- command


def build_command(args: argparse.Namespace, train_arguments: list[str]) -> list[str]:
    """The torchrun command line of this node, one item per argument; no shell reads it."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", str(args.machine_num), "--node_rank", str(args.node_rank), "--nproc_per_node", str(args.np)]
    if args.standalone:
        command += ["--standalone"]  # a free port: several runs may share one machine
    else:
        command += ["--master_addr", args.ip, "--master_port", str(args.main_port)]
        if args.rendezvous_timeout is not None:
            command += ["--rdzv_conf", f"timeout={args.rendezvous_timeout}"]

    # `--flag=value`, so that a value that starts with a dash is not taken for a flag.
    train = [f"--cfg={args.config}", f"--data-path={args.data_path}", f"--output={args.output}"]
    train += [f"--tag={args.tag}"] if args.tag is not None else []
    train += [f"--batch-size={args.batchsize}"] if args.batchsize is not None else []
    return [*command, "train.py", *map(keep_literal, train + train_arguments)]


def keep_literal(argument: str) -> str:
    """torchrun expands `$$` and `$local_rank` in a worker's arguments: double the dollars where that would happen."""
    expanded = string.Template(argument).safe_substitute(local_rank="")
    return argument if expanded == argument else argument.replace("$", "$$")


def torchrun_environment(args: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to the environment; only --vis_gpu overrides what the user has set.

    Settings of torchrun by environment variable: a torchrun that does not know one ignores it.
    """
    # A signal that is missing here kills torchrun instead of reaching the workers. One that is there is no longer
    # ignored, by torchrun and its workers: torchrun would undo nohup.
    names = [number.name for number in (*STOP_SIGNALS, signal.SIGQUIT) if not is_ignored(number)]
    defaults = {"PET_SIGNALS_TO_HANDLE": ",".join(names), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)}
    added = {name: value for name, value in defaults.items() if name not in environ}
    if args.vis_gpu:
        added["CUDA_VISIBLE_DEVICES"] = ",".join(args.vis_gpu)
    return added


def is_ignored(number: signal.Signals) -> bool:
    """Whether this process was started with a signal ignored, as nohup and a shell's background jobs do it."""
    return signal.getsignal(number) == signal.SIG_IGN


def missing_paths(args: argparse.Namespace, train_arguments: Sequence[str]) -> Iterator[str]:
    """A line for each path that train.py would read and that is not on this machine."""
    paths = {"--data_path": args.data_path}
    for word, following in zip(train_arguments, [*train_arguments[1:], ""]):
        name, equals, value = word.partition("=")
        if name in PATHS_TO_READ:
            paths[PATHS_TO_READ[name]] = value if equals else following
    for flag, path in paths.items():
        if not (Path(args.code_path) / path).exists():
            yield f"{flag}: not on this machine: {path} (relative paths start at {args.code_path})"


def format_command(command: list[str], environment: dict[str, str], code_path: str) -> str:
    """One line that does in a shell what this script does without."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    return shlex.join(["env", "-C", str(Path(code_path).resolve()), *settings, *command])


# --- supervision


def supervise(args: argparse.Namespace, command: list[str], environment: dict[str, str]) -> int:
    """Run torchrun to its end, again after a fault while retries are left; returns the exit code of this script."""
    node = f"node {args.node_rank}"
    stop_signals = {number for number in STOP_SIGNALS if not is_ignored(number)}
    # Blocked signals wait in a queue, so none is lost between two instructions. SIGCHLD says that torchrun has ended.
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, {*stop_signals, signal.SIGCHLD})
    retries_left = args.retries
    try:
        with tempfile.TemporaryDirectory(prefix="groupmixformer-") as folder:
            base = Path(os.environ.get("PET_LOG_DIR") or folder)
            base.mkdir(parents=True, exist_ok=True)
            while True:
                logs = tempfile.mkdtemp(prefix=f"node{args.node_rank}_", dir=base)  # reports of this start alone
                began = time.monotonic()
                variables = {**os.environ, **environment, "PET_LOG_DIR": logs}
                code, stopped_by = run_once(command, args.code_path, variables, stop_signals, mask_before)
                if code == 0:
                    return 0
                cause, worker_code = read_report(Path(logs)) or (why_not_started(args), None)
                code = worker_code or code
                if code == EXIT_STOPPED:
                    log(f"{node}: the run has saved and stopped; start it again to continue")
                    return code
                if stopped_by is not None:
                    log(f"{node}: ended by {signal.Signals(stopped_by).name} before the run had saved")
                    return 128 + stopped_by
                fault = f"{node}: torchrun ended with code {code}" + (f": {cause}" if cause else "")
                if time.monotonic() - began >= RENEWAL_SECONDS:
                    retries_left = args.retries
                if code == EXIT_MISTAKE or retries_left == 0:
                    advice = "fix this before restarting" if code == EXIT_MISTAKE else "no retries left"
                    log(f"{fault}; {advice}" if args.retries else fault)
                    return code
                log(f"{fault}; starting it again in {args.retry_wait} s, retries left: {retries_left}")
                pending = signal.sigtimedwait(stop_signals, args.retry_wait)
                if pending is not None:
                    return 128 + pending.si_signo
                retries_left -= 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)


def run_once(command, code_path, environment, stop_signals, mask_before) -> tuple[int, int | None]:
    """Start torchrun and wait for it, forwarding signals; returns its exit code and the first signal, if any came."""
    launcher_pid = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare_child():
        # If this launcher is killed, the kernel sends SIGTERM to torchrun, which forwards it to its workers.
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != launcher_pid:
                os._exit(1)  # the launcher was killed before the line above
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)

    # A session of its own: Ctrl-C in a terminal reaches this process only, which forwards it once.
    child = subprocess.Popen(command, cwd=code_path, env=environment, start_new_session=True, preexec_fn=prepare_child)
    stopped_by = None
    while child.poll() is None:
        number = signal.sigwait({*stop_signals, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            child.send_signal(number)
            stopped_by = stopped_by or number
    code = child.returncode
    return (code if code >= 0 else 128 - code), stopped_by


def read_report(logs: Path) -> tuple[str, int | None] | None:
    """Line and exit code of the worker that failed first: ("", None) if no worker reported, None if none was started.

    torchrun makes `<run>/attempt_<n>/<local rank>/` for every worker, and gives it the file error.json in there. Of the
    workers' exit codes torchrun itself makes 1.
    """
    attempts = sorted(logs.glob("*/attempt_*"), key=os.path.getmtime)  # more than one with --max-restarts
    if not attempts:
        return None
    reports = []
    for path in attempts[-1].glob("*/error.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a full disk, or not written by train.py
            report = json.loads(path.read_text())["message"]
            reports.append((float(report["extraInfo"]["timestamp"]), report["message"], report.get("errorCode")))
    return min(reports, key=lambda report: report[0])[1:] if reports else ("", None)


def why_not_started(args: argparse.Namespace) -> str:
    """The likeliest causes where torchrun has ended without having started a worker."""
    if args.standalone:
        return "no worker was started"
    return (
        f"the {args.machine_num} nodes have not met within {args.rendezvous_timeout or RENDEZVOUS_SECONDS} s at "
        f"{args.ip}:{args.main_port}, or node 0 cannot use that port; start all of them with the same --machine_num, "
        "--ip and --main_port, give an address of node 0 as --ip, and a port that is free there"
    )


def log(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading it any more
        print(f"multi_machine_start.py: {message}", file=sys.stderr, flush=True)


@command("multi_machine_start.py")
def main(argv: Sequence[str] | None = None) -> int:
    args, train_arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    command = build_command(args, train_arguments)
    environment = torchrun_environment(args, os.environ)
    line = format_command(command, environment, args.code_path)
    if args.dry_run:
        print(line)
        for missing in missing_paths(args, train_arguments):
            log(missing)
        return 0
    log(f"node {args.node_rank} of {args.machine_num}: {line}")
    return supervise(args, command, environment)


if __name__ == "__main__":
    sys.exit(main())
