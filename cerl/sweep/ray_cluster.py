"""The Ray cluster of a sweep: an existing one, or one that is started on this machine, and the
places for runs that its nodes have.

Ray is an extra, so it is imported only where it is needed.
"""

import contextlib
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cerl.config import ConfigError
from cerl.device.cores import cores
from cerl.sweep.slots import VISIBLE, chosen

INSTALL = "pip install 'cerl[ray]'"
PATIENCE = 5.0  # seconds to wait for a connection to a cluster
STORE = 80_000_000  # bytes of shared memory for a cluster of our own; runs put nothing there
PARTS = 10_000  # Ray counts resources in such parts of one
# Ray's socket files must have paths of at most 107 bytes; below its folder they need about 60.
_LONGEST = 40


class Node(NamedTuple):
    """A living node of a cluster."""

    id: str
    name: str  # host name
    cpus: float  # all that Ray may give to tasks, whether they are in use or not
    gpus: float


class Need(NamedTuple):
    """What one run asks Ray for."""

    cpus: float
    gpus: float  # a GPU, or a fraction of one

    def places(self, node: Node) -> int:
        """How many runs a node can train at the same time, if it does nothing else."""
        found = []
        if self.cpus:
            found.append(_times(node.cpus, self.cpus))
        if self.gpus:
            found.append(int(node.gpus) * _times(1, self.gpus))
        return min(found)

    @property
    def text(self) -> str:
        gpu = f"{self.gpus:g} of a GPU" if 0 < self.gpus < 1 else f"{self.gpus:g} GPU"
        cpus = "CPU" if self.cpus == 1 else "CPUs"
        return f"{gpu} and {self.cpus:g} {cpus}" if self.gpus else f"{self.cpus:g} {cpus}"


def _times(whole: float, part: float) -> int:
    return round(whole * PARTS) // max(1, round(part * PARTS))


def _share(whole: float, count: float) -> float:
    """An equal share in parts that Ray can count: whole numbers if it is at least 1."""
    share = whole / count
    return float(math.floor(share)) if share >= 1 else math.floor(share * PARTS) / PARTS


def need_on_gpus(nodes: Sequence[Node], *, jobs: int | None, per_gpu: int | None) -> Need:
    """What a run on a GPU needs: its share of the GPU, and of the CPUs of its node.

    Args: nodes with GPUs, at least one; jobs, how many runs shall train at the same time; per_gpu,
          how many of them share a GPU: by default as many as `jobs` needs.
    """
    gpus = sum(int(node.gpus) for node in nodes)
    each = per_gpu or -(-(jobs or gpus) // gpus)
    cpus = min(_share(node.cpus, int(node.gpus) * each) for node in nodes)
    return Need(cpus, _share(1, each))


def need_on_cpus(nodes: Sequence[Node], *, jobs: int | None) -> Need:
    """What a run on a CPU needs: as many CPUs as `jobs` runs can have at the same time. By default
    there are as many runs as nodes."""
    counts = [int(node.cpus) for node in nodes if node.cpus >= 1]
    wanted = jobs or len(counts)
    for cpus in range(max(counts, default=1), 1, -1):
        if sum(count // cpus for count in counts) >= wanted:
            return Need(cpus, 0)
    return Need(1, 0)


def nodes() -> list[Node]:
    """The living nodes of the cluster to which this process is connected."""
    return [
        Node(
            id=node["NodeID"],
            name=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in imported().nodes()
        if node["Alive"]
    ]


def inventory(nodes: Sequence[Node]) -> str:
    """What the nodes of a cluster have, for messages."""
    return "; ".join(f"{node.name}: {node.gpus:g} GPUs, {node.cpus:g} CPUs" for node in nodes)


@contextlib.contextmanager
def connected(address: str | None, *, device: str) -> Iterator[None]:
    """A context in which this process is connected to a cluster.

    Args:   address, `auto` for the cluster that runs on this machine or HOST:PORT; None starts a
            cluster here, which only this machine can reach, and which ends with the context;
            device, of the command line, that a cluster started here has.
    Raises: ConfigError if Ray is not installed, or there is no cluster at the address.
    """
    with contextlib.ExitStack() as stack:
        found: dict[str, Any] = {"address": address}
        if address is None:
            gpus = chosen(device)
            # Before Ray is imported: these make it listen on 127.0.0.1 alone, let only those in who
            # know the token, and keep it from reporting statistics of use.
            local = {
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_USAGE_STATS_ENABLED": "0",
                **({VISIBLE: ",".join(gpus)} if gpus else {}),
            }
            stack.enter_context(_variables(local))
            found = {
                "address": "local",
                "num_cpus": cores(),
                "num_gpus": len(gpus),
                "include_dashboard": False,
                "object_store_memory": STORE,
                "_temp_dir": stack.enter_context(_folder()),
            }
        elif address != "auto":
            _check_address(address)
        ray = imported()
        try:
            with _signals_kept():
                ray.init(**found, log_to_driver=False, logging_level="error")
            _silence(ray)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = (
                "a cluster cannot be started here" if address is None else f"no way to {address}"
            )
            raise ConfigError(f"ray: {where}: {error}{_hint(address)}") from error
        stack.callback(ray.shutdown)
        yield


def imported() -> Any:
    """The package `ray`. Raises: ConfigError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--launcher ray needs Ray ({error}); install it: {INSTALL}") from error
    return ray


def _silence(ray: Any) -> None:
    """Keeps Ray from printing pages of a lost node's log on stdout; it has no option for that.

    The sweep tells of lost nodes itself, and Ray's own logs hold the rest.
    """
    worker = ray._private.worker
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *arguments, **options: None


def _check_address(address: str) -> None:
    """Connects to a cluster for a moment: Ray itself would try for a long time.

    Raises: ConfigError.
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()) or "/" in host:
        raise ConfigError(
            f"--address: expected auto or HOST:PORT, as `ray start` prints it, got {address!r}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--address {address}: no Ray cluster answers there ({error}){_hint(address)}"
        ) from error


def _hint(address: str | None) -> str:
    if address is None:
        return ""
    return (
        "; this command has to run on a node of the cluster: `ray status` shows whether this "
        "machine is one, `ray start --head` starts a cluster, and without --address a cluster "
        "of this machine alone is started for the sweep"
    )


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """A context with other environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A context with a folder for the sockets and logs of a cluster started here."""
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="cerl-ray-", dir="/tmp" if len(base) > _LONGEST else base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """A context after which SIGTERM is handled as before: `ray.init` replaces its handler."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
