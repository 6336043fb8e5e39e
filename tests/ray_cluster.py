"""A Ray cluster of a head and two nodes on this machine, for tests of sweeps.

    python tests/ray_cluster.py      prints its address, and reads commands from stdin:
        kill N      kills all processes of the N-th living node, counted from 0, as if its machine
                    had died; prints `killed`
        raylet N    kills only Ray's main process of that node; prints `killed`
        add         adds a node like the others; prints `added`
                    the cluster ends with the end of stdin

It listens on 127.0.0.1 only. Each node has two CPUs and two GPUs, which are mere numbers.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
NODE: dict[str, Any] = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 80_000_000}


def serve() -> None:
    """Starts a cluster, and does what stdin says until its end."""
    from ray.cluster_utils import Cluster

    head = {**NODE, "num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(**NODE) for _ in range(2)]
        print(cluster.address, flush=True)
        for line in sys.stdin:
            command, _, number = line.strip().partition(" ")
            if command == "kill":
                raylet = nodes.pop(int(number)).all_processes["raylet"][0].process
                for process in [raylet.pid, *descendants(raylet.pid)]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                raylet.wait()  # otherwise it counts as alive
                print("killed", flush=True)
            elif command == "raylet":
                raylet = nodes.pop(int(number)).all_processes["raylet"][0].process
                raylet.kill()
                raylet.wait()
                print("killed", flush=True)
            elif command == "add":
                nodes.append(cluster.add_node(**NODE))
                print("added", flush=True)
    finally:
        cluster.shutdown()


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and that those have started, by number."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the name in parentheses: the state, and the number of the parent.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.parent.name))
    found, left = [], [process]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


class RayCluster:
    """A cluster in a process of its own, so that Ray does nothing to that of the tests."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.address = self._line()

    def kill(self, number: int) -> None:
        """Kills all processes of a node. Args: number among the living ones, from 0."""
        assert self._asked(f"kill {number}") == "killed"

    def kill_raylet(self, number: int) -> None:
        """Kills only Ray's main process of a node. Args: number among the living ones, from 0."""
        assert self._asked(f"raylet {number}") == "killed"

    def add(self) -> None:
        """Adds a node."""
        assert self._asked("add") == "added"

    def _asked(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the Ray cluster has ended"
        return line.strip()


@contextlib.contextmanager
def cluster() -> Iterator[RayCluster]:
    """A context with a cluster."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())],
        env={**os.environ, **LOOPBACK},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:  # its end closes stdin, and waits
        yield RayCluster(process)


if __name__ == "__main__":
    serve()
