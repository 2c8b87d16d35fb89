#!/usr/bin/env python3
"""Start this machine's share of a training run: check the arguments, start torchrun and supervise it.

Run it on every machine, with the same arguments except for the node's rank:

    python multi_machine_start.py --machine_num 2 --node_rank 0 --ip 10.0.0.1 --main_port 29500 --np 8 \\
        --config configs/groupmixformer_small.yaml --data_path ~/imagenet --output output --tag small \\
        -- --opts TRAIN.EPOCHS 100

Everything after `--` goes to train.py. Without --node_rank, the first of these variables that is set gives the rank:
SLURM_NODEID, NODE_RANK, PET_NODE_RANK, GROUP_RANK, MACHINE_RANK. (SLURM_PROCID counts tasks, not nodes.)

The launcher forwards SIGTERM, SIGINT and SIGUSR1, so that train.py can save and end. After a fault it starts torchrun
again, up to --retries times, and train.py continues from its last good checkpoint. After an hour of training the count
starts again from 0. The launcher does not retry a mistake that train.py finds before it trains.

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
from collections.abc import Sequence
from pathlib import Path

from configs import UserError
from configs.commands import CommandParser, command
from configs.errors import EXIT_MISTAKE, EXIT_STOPPED

RENEWAL_SECONDS = (
    3600  # a start that lasted so long made progress: days of training may meet more faults than --retries
)
RENDEZVOUS_SECONDS = 900  # torchrun's own limit of waiting for the other nodes
NODE_RANK_VARIABLES = ("SLURM_NODEID", "NODE_RANK", "PET_NODE_RANK", "GROUP_RANK", "MACHINE_RANK")
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Settings of torchrun by environment variable: a torchrun that does not know one ignores it.
TORCHRUN_DEFAULTS = {
    # A signal that is missing here kills torchrun instead of reaching the workers.
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    # Seconds from a forwarded signal to SIGKILL. The default of 30 is short for a checkpoint on a slow disk. SLURM
    # gives 120 (slurm_train.sh).
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90",
}


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

    def add(flag: str, **kwargs) -> None:
        """Takes --two_words as --two-words too, like torchrun."""
        parser.add_argument(flag, *({flag[:2] + flag[2:].replace("_", "-")} - {flag}), **kwargs)

    count, positive = whole_number(0), whole_number(1)
    add("--machine_num", type=positive, default=1, help="number of nodes (default: 1)")
    add("--node_rank", type=count, help="rank of this node, from 0 (default: see above)")
    add("--np", type=positive, help="processes on this node, one per GPU (default: the number of GPUs)")
    add("--ip", help="address of node 0; needed with several nodes")
    add("--main_port", type=whole_number(1, 65535), help="port on node 0 (29500; with one node, any free port)")
    add("--vis_gpu", type=lambda text: text.split(","), help="GPUs to use on this node, such as 0,1,2,3 (default: all)")
    add("--code_path", default=str(Path(__file__).parent), help="checkout to run in (default: this one)")
    # The paths in the next three flags are relative to the checkout.
    add(
        "--config", default="configs/groupmixformer_small.yaml", help="YAML file in the checkout (default: %(default)s)"
    )
    add("--data_path", default="./datasets/imagenet", help="folder with train/ and val/ (default: %(default)s)")
    add("--output", default="./output", help="folder for runs, shared by all nodes (default: %(default)s)")
    add("--tag", help="name of the run (default: the config's)")
    add("--batchsize", type=positive, help="images per GPU (default: the config's)")
    add("--retries", type=count, default=0, help="how often to start again after a fault (default: 0)")
    add("--retry_wait", type=count, default=10, help="seconds before that; the others notice the fault (default: 10)")
    add("--rendezvous_timeout", type=positive, help=f"seconds to wait for other nodes (default: {RENDEZVOUS_SECONDS})")
    add("--dry_run", action="store_true", help="print the command instead of running it")
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
    if args.machine_num > 1 and not args.ip:
        raise UserError("--ip: with several nodes, the address of node 0 is needed")
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
    args.ip, args.main_port = args.ip or "127.0.0.1", args.main_port or 29500


def resolve_node_rank(flag: int | None, machine_num: int, environ) -> int:
    """This node's rank: the flag, else the first of NODE_RANK_VARIABLES that is set; raises UserError.

    A single node has rank 0 whatever the variables say: it may be one run of many in a SLURM job.
    """
    source, rank = "--node_rank", flag
    if flag is None and machine_num == 1:
        return 0
    if flag is None:
        source = next((name for name in NODE_RANK_VARIABLES if environ.get(name)), None)
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


# --- supervision


def supervise(args: argparse.Namespace, command: list[str], environment: dict[str, str]) -> int:
    """Run torchrun to its end, again after a fault while retries are left; returns the exit code of this script."""
    node = f"node {args.node_rank}"
    # A signal that this process was started with ignored (nohup, a shell's background job) stays ignored.
    stop_signals = {s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if signal.getsignal(s) != signal.SIG_IGN}
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
        return 0
    log(f"node {args.node_rank} of {args.machine_num}: {line}")
    return supervise(args, command, environment)


if __name__ == "__main__":
    sys.exit(main())
