"""How the processes of a run find each other: their places, an address, and an agreement before anything is computed.

Places come from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which scripts/launch_node.py, deepspeed and
torchrun set, else from a Slurm step of several tasks; otherwise the run is a world of one. What is wrong with them ends
every process with one line per node instead of a hang.
"""

import os
import re
import socket
import struct
import time
from datetime import timedelta

import torch.distributed as dist

from general_preference.errors import InputError

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def join(backend: str, timeout: float, join_timeout: float) -> None:
    """Initialize torch's process group together with all other processes; one that exists already is taken as it is.

    Args:
        backend: "gloo" or "nccl".
        timeout: seconds a process later waits for the others.
        join_timeout: seconds until all of them must have come.

    Raises:
        InputError: an address that cannot be reached, a process that does not come, or places that contradict.
    """
    find_place()
    if dist.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if world_size == 1:
        store: dist.Store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
    else:
        deadline = time.monotonic() + join_timeout
        store, shared = meeting_point(address, port, rank, join_timeout)
        try:
            agree(shared, rank, world_size, deadline, f"{address}:{port}", join_timeout)
        except dist.DistError as error:
            raise refusal(f"process 0 at {address}:{port} left while the processes joined: see its output") from error
    if spans_nodes() and "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo would take the address that the host's own name resolves to: often 127.0.1.1.
        interface = interface_towards(address)
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    # Groups that libraries make of this one take these, whatever the timeout of this one.
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=timeout)
    dist.distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
    except RuntimeError as error:
        if world_size == 1:
            raise
        name = os.environ.get("GLOO_SOCKET_IFNAME", "the host name's")
        raise refusal(
            f"the processes met at {address}:{port} but cannot connect to each other over {backend} "
            f"(interface {name}; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names another): {first_line(error)}"
        ) from error


def find_place() -> None:
    """Complete what the environment says about this process; a world of one on a free port if it says nothing.

    Raises:
        InputError: it says too little, no numbers, or a rank outside the world.
    """
    environment = os.environ
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        environment.update(slurm_place(dict(environment)) or alone)
    environment.setdefault("LOCAL_RANK", "0")
    if environment["WORLD_SIZE"] == "1":
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        if environment.get("MASTER_PORT", "0") == "0":
            with socket.socket() as probe:  # so that two runs on a machine do not meet
                probe.bind(("127.0.0.1", 0))
                environment["MASTER_PORT"] = str(probe.getsockname()[1])
    elif "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        raise InputError("WORLD_SIZE is set, but not MASTER_ADDR and MASTER_PORT: start with scripts/launch_node.py")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise InputError(f"{name}={environment[name]} is no number")
    if int(environment["MASTER_PORT"]) > 65535:
        raise InputError(f"MASTER_PORT={environment['MASTER_PORT']} is no port: use 1024 to 65535")
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise InputError(f"RANK={environment['RANK']} is not below WORLD_SIZE={environment['WORLD_SIZE']}")


def slurm_place(environment: dict[str, str]) -> dict[str, str]:
    """What `srun` says about a task of a step of several, under torch's names; empty outside of one.

    A batch script is told its allocation's SLURM_NTASKS too, but only a step has a SLURM_STEP_NUM_TASKS.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    names = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")
    if tasks == "1" or not all(name in environment for name in names):
        return {}
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    one_device_each = re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))  # srun --gpus-per-task=1
    return {
        "PLACED_BY": "slurm",
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": "0" if one_device_each else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(max(int(tasks) // nodes, 1)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(10000 + int(environment["SLURM_JOB_ID"]) % 20000),
    }


def first_host(nodelist: str) -> str:
    """First host of a Slurm list: "node[003-006,9],other" is "node003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist).group()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def placed_by_slurm() -> bool:
    """Whether the processes are tasks of a Slurm step, started by no launcher of ours, DeepSpeed's or torch's."""
    return os.environ.get("PLACED_BY") == "slurm"


def spans_nodes() -> bool:
    """Whether the run's processes are on more than one node, as far as the environment says."""
    world_size = int(os.environ["WORLD_SIZE"])
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # the latter by DeepSpeed's launcher
    if here is None:
        return world_size > 1 and not os.environ["MASTER_ADDR"].startswith(("127.", "localhost"))
    return world_size > int(here)


def meeting_point(address: str, port: int, rank: int, seconds: float) -> tuple[dist.Store, dist.Store]:
    """The store of process 0, or of torchrun where it keeps one; waits at most `seconds` for it.

    Returns:
        The store to keep, and the one that the address leads to: the same, unless two processes think they are 0.

    Raises:
        InputError: nobody answers at the address, or the port is taken.
    """
    # As torch's own env:// does: torchrun holds the store, and starts over in the same one.
    torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not torchrun
    if serves:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise refusal(f"MASTER_PORT={port} is taken ({error.strerror}): another run? set another") from error
    else:
        wait_until_reachable(address, port, seconds)
    options = {"timeout": timedelta(seconds=seconds), "wait_for_workers": False}
    try:
        own = dist.TCPStore("127.0.0.1", port, is_master=True, **options) if serves else None
        if own is not None:
            wait_until_reachable(address, port, min(seconds, 30))
        shared: dist.Store = dist.TCPStore(address, port, **options)
    except dist.DistError as error:
        raise refusal(f"cannot join at MASTER_ADDR={address} MASTER_PORT={port}: {first_line(error)}") from error
    if torchrun:
        shared = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", shared)
    return own or shared, shared


def wait_until_reachable(address: str, port: int, seconds: float) -> None:
    """Return once somebody listens there; an InputError that names the address after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise refusal(
                    f"nobody answers at MASTER_ADDR={address} MASTER_PORT={port} after {seconds:g} seconds ({error}): "
                    "is node 0 running, and is this its address?"
                ) from error
        time.sleep(0.2)


def agree(store: dist.Store, rank: int, world_size: int, deadline: float, where: str, seconds: float) -> None:
    """Return once all processes are here and count the same; otherwise all of them raise the same InputError.

    Whoever finds something wrong, or comes last, writes the verdict; nobody waits beyond `deadline` (monotonic).
    """
    problem = ""
    counted = store.compare_set("world_size", "", str(world_size)).decode()
    if counted != str(world_size):
        problem = (
            f"the nodes disagree: some count {counted} processes in all, others {world_size} (WORLD_SIZE): "
            "give every node the same NNODES and NPROC"
        )
    elif store.add(f"rank/{rank}", 1) > 1:
        problem = f"two processes at {where} have rank {rank}: does every node have a NODE_RANK of its own?"
    if problem:  # before it is counted: who comes last must not find everything fine
        store.compare_set("verdict", "", problem)
    if store.add("arrived", 1) == world_size:
        store.compare_set("verdict", "", "fine")
    pause = 0.01
    while not store.check(["verdict"]):
        if time.monotonic() > deadline:
            missing = [other for other in range(world_size) if not store.check([f"rank/{other}"])]
            names = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            late = f"process {names} of {world_size} did not come to {where} within {seconds:g} seconds"
            store.compare_set("verdict", "", f"{late}: did every node start?")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    verdict = store.get("verdict").decode()
    store.add("read", 1)
    if not problem and verdict == "fine":
        return
    patience = time.monotonic() + 5
    while rank == 0 and store.add("read", 0) < store.add("arrived", 0) and time.monotonic() < patience:
        time.sleep(0.05)  # the store goes when this process does
    raise refusal(problem or verdict)


def interface_towards(address: str) -> str | None:
    """Name of the network interface from which `address` is reached; None if it cannot be told, or only by loopback."""
    import fcntl  # not on every system

    for target in (address, "192.0.2.1"):  # a host's own name often means its loopback: then the default route
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))  # chooses a route, sends nothing
                own = probe.getsockname()[0]
                for _, name in socket.if_nameindex():
                    if not own.startswith("127.") and _address_of(probe, name, fcntl.ioctl) == own:
                        return name
        except OSError:
            continue
    return None


def _address_of(any_socket: socket.socket, interface: str, ioctl) -> str | None:
    try:
        found = ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:  # it has no IPv4 address
        return None
    return socket.inet_ntoa(found[20:24])


def refusal(text: str) -> InputError:
    """An InputError of joining: ranks cannot be relied on yet, so one process of each node says it."""
    error = InputError(text)
    error.everywhere = os.environ.get("LOCAL_RANK", "0") != "0"
    return error


def first_line(error: Exception) -> str:
    """Torch's messages go on with a stack of C++ frames."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
