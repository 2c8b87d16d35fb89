"""This process among all, and the few collective operations that training and evaluation need."""

import fcntl
import inspect
import os
import signal
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs import UserError
from configs.errors import Fault
from data.workers import set_parent_death_signal

from .failures import is_communication_failure, report_failure


@dataclass(frozen=True)
class Processes:
    """This process (`rank` of `world_size`, `local_rank` on its node) and the device that it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def init_processes(timeout_seconds: float) -> Processes:
    """Join the process group that the launcher's environment describes: NCCL where there are GPUs, else gloo.

    Without a launcher (no RANK in the environment) there is one process and no group. timm's
    `init_distributed_device` sets no timeout, and a process that waits for a lost one must give up some time.

    Raises UserError where a node has fewer GPUs than processes.
    """
    rank, world_size, local_rank = (int(os.environ.get(k, d)) for k, d in _ENVIRONMENT)
    use_cuda = torch.cuda.is_available()
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; start as many processes "
            "as there are GPUs (--nproc_per_node), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPU"
        )
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        choose_interface()
        timeout = timedelta(seconds=timeout_seconds)
        # torchrun --max-restarts keeps its store: what the processes of the last start left there would be taken for
        # addresses of this one's, and all would wait for each other.
        store = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))[0]
        store.set_timeout(timeout)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend="nccl" if use_cuda else "gloo",
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if use_cuda else None,
        )
    return Processes(rank, local_rank, world_size, device)


def choose_interface() -> None:
    """Where there are several nodes, let gloo use the network interface that leads to MASTER_ADDR.

    By itself gloo takes the one that this host's own name resolves to, which often is loopback (Debian's 127.0.1.1):
    no other node can connect to that. GLOO_SOCKET_IFNAME, where it is set, is left alone.
    """
    address = os.environ.get("MASTER_ADDR", "")
    several_nodes = int(os.environ["WORLD_SIZE"]) > int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if "GLOO_SOCKET_IFNAME" in os.environ or not several_nodes or address in ("", "localhost", "127.0.0.1"):
        return
    # On node 0 the name of the node may itself be loopback; then what leads out of this machine (RFC 5737's address).
    for host in (address, "192.0.2.1"):
        name = interface_towards(host)
        if name not in ("", "lo"):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def interface_towards(host: str) -> str:
    """The network interface by which this machine reaches an IPv4 host; '' where it is unknown. Sends nothing."""
    SIOCGIFADDR = 0x8915  # from netdevice(7): an interface's address, in a structure of its name and a sockaddr_in
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:  # no such name, no route
            return ""
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                if fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    return ""


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@contextmanager
def rendezvous_errors(timeout_seconds: float) -> Iterator[None]:
    """Around the making of a process group: what goes wrong is one line, and takes no longer than twice the timeout.

    gloo starts its timeout again for every other process.
    """

    def line(cause: object) -> str:
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or "the one of its host name"
        return (
            f"{socket.gethostname()} has not met the other processes (MASTER_ADDR {os.environ.get('MASTER_ADDR')}, "
            f"network interface {interface}); where the nodes reach each other by another one, set GLOO_SOCKET_IFNAME, "
            f"and NCCL_SOCKET_IFNAME for GPUs: {str(cause).strip().splitlines()[0][:200]}"
        )

    def give_up() -> None:
        report_failure(line(f"nothing within {2 * timeout_seconds:g} s"))
        os._exit(2)

    timer = threading.Timer(2 * timeout_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if not is_communication_failure(error):
            raise
        raise Fault(line(error)) from None
    finally:
        timer.cancel()


def die_with_launcher() -> None:
    """Let the kernel kill this process when torchrun dies, so that it does not train on unseen.

    Only under torchrun: a run started by hand outlives its shell, as nohup users expect.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it died before this took effect
        sys.exit(1)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # or even while this process imported torch
        where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        try:
            socket.create_connection(where, timeout=10).close()
        except OSError as error:
            raise Fault(f"torchrun at {where[0]}:{where[1]} cannot be reached, it has ended: {error}") from None


def close_processes() -> None:
    """Leave the process group in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap_distributed(network: nn.Module, processes: Processes) -> nn.Module:
    """Average gradients over the processes, and on GPUs the statistics of batch norms.

    On CPU, where torch has no synchronised batch norm, every process normalises by its own batch. The running
    statistics of process 0 are the network's: DDP broadcasts them before each forward pass.

    Args:
        network: is left as it is, but for its batch norms on GPUs.
        processes: this process among all.
    """
    if not processes.distributed:
        return network
    # On CPU the gradients of depthwise convolutions come channels last; DDP copies them and says so at every start.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if processes.device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        options = dict(device_ids=[processes.device.index], **WITHOUT_BUFFERS)
    else:
        options = {}
    # After the first update of each start, DDP reorders its buckets, and with them the order of summation. From three
    # processes on, a resumed run would then have other bits. A search for unused parameters keeps the first order.
    exact = processes.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return DistributedDataParallel(network, find_unused_parameters=exact and processes.world_size > 2, **options)


# Synchronised running statistics need no broadcast before every forward pass. The option's name depends on torch.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
WITHOUT_BUFFERS = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside what `wrap_distributed` returns."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def broadcast_batchnorm_stats(network: nn.Module, processes: Processes) -> None:
    """Give every process the running statistics of process 0, so that all evaluate one and the same network."""
    if processes.distributed:
        distribute_bn(network, processes.world_size, reduce=False)


def sum_over_processes(values: Tensor, processes: Processes) -> Tensor:
    """Sum a tensor over all processes; it is returned, on every process."""
    if processes.distributed:
        dist.all_reduce(values)
    return values


GATHERED_ROWS = 4096  # rows of a process that travel at once: bounds what the main process holds twice


def gather_on_main(rows: Tensor, counts: Sequence[int], processes: Processes) -> Tensor | None:
    """The rows (on the CPU) of all processes, one process after the other, on the main one; None on the others.

    Args:
        rows: this process's, (counts[rank], ...).
        counts: how many rows each process has, the same list everywhere.
        processes: this process among all.
    """
    if not processes.distributed:
        return rows
    gathered: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(counts), GATHERED_ROWS):
        size = min(GATHERED_ROWS, max(counts) - start)
        chunk = torch.zeros((size, *rows.shape[1:]), dtype=rows.dtype, device=processes.device)
        own = rows[start : start + size]
        chunk[: len(own)] = own.to(processes.device)
        received = [torch.empty_like(chunk) for _ in counts] if processes.is_main else None
        dist.gather(chunk, received, dst=0)
        for parts, part, count in zip(gathered, received or (), counts):
            parts.append(part[: max(0, count - start)].cpu())
    return torch.cat([part for parts in gathered for part in parts]) if processes.is_main else None


def run_on_main_and_broadcast(function: Callable[[], Any], processes: Processes) -> Any:
    """What `function()` returns on the main process, on every process; its UserError is raised on every process."""
    if not processes.distributed:
        return function()
    answer: list[Any] = [None, None]
    if processes.is_main:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = error.one_line()
    dist.broadcast_object_list(answer, src=0, device=processes.device)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]
