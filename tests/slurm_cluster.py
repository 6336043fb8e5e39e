"""A cluster of SLURM on this machine for tests: the real controller and two nodes, on loopback.

It needs root and the packages slurm-wlm and munge of Debian or Ubuntu, but no service manager.
Where the environment variable CERL_REQUIRE has `slurm` in it, tests fail if these are missing;
otherwise they are skipped.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# Nodes n0 and n1; jobs of the partition `urgent` preempt those of `main` on n0. A dead node is
# noticed after 10 seconds, and a requeued job waits 6 instead of 121 seconds (5 is the least).
CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MinJobAge=300
MaxArraySize=1001
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
GresTypes=gpu
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node0} CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node1} CPUs=2 RealMemory=4000
PartitionName=main Nodes=n0 Default=YES MaxTime=INFINITE DefaultTime=60 DefMemPerCPU=100 \
PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n0 MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=10 PreemptMode=OFF
PartitionName=second Nodes=n1 MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=1
"""


def missing() -> str:
    """Why the cluster cannot run here; "" if it can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root here"
    gone = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(gone)}: apt-get install slurm-wlm munge" if gone else ""


class Cluster:
    """A running cluster. Attributes: folder, of its files; variables of the environment that
    programs of SLURM need."""

    def __init__(self, folder: Path, *, port: int) -> None:
        self.folder, self.port = folder, port
        self.variables = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Starts the daemons, and waits until both nodes are idle."""
        folder = self.folder
        for name in ("munge", "ctld", "spooln0", "spooln1", "dev"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "munge").chmod(0o711)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = {"port": self.port, "node0": self.port + 1, "node1": self.port + 2}
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, **ports))
        for number in range(2):  # stand-ins for GPUs have to be devices
            os.mknod(folder / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        gres = f"NodeName=n0 Name=gpu File={folder}/dev/nvidia[0-1]\n"
        (folder / "gres.conf").write_text(gres)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        munge = folder / "munge"
        self.call(
            *("munged", "--force", f"--socket={munge}/socket", f"--key-file={key}"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
            "--num-threads=2",
        )
        self.call("slurmctld")
        self.start_node("n0")
        self.start_node("n1")
        self.until(lambda: self.states() == ["idle", "idle"])

    def start_node(self, name: str) -> None:
        self.call("slurmd", "-N", name)

    def states(self) -> list[str]:
        """The states of both nodes, e.g. idle or mixed."""
        done = self.call("sinfo", "-h", "-N", "-p", "main,second", "-o", "%t", check=False)
        return done.stdout.split()

    def call(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a program of SLURM."""
        log = self.folder / "calls.log"
        with log.open("a+") as errors:  # a daemon would keep a pipe open
            begin = errors.seek(0, 2)
            out = self.folder / "stdout"
            with out.open("w") as output:
                done = subprocess.run(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    env=self.variables,
                )
            errors.seek(begin)
            found = subprocess.CompletedProcess(
                words, done.returncode, out.read_text(), errors.read()
            )
        assert not check or found.returncode == 0, f"{words}: {found.stdout}{found.stderr}"
        return found

    def takes(self, *words: str) -> bool:
        """Runs a program of SLURM. Returns: whether it succeeded."""
        return self.call(*words, check=False).returncode == 0

    def until(self, found: Callable[[], object], *, seconds: float = 200.0) -> None:
        """Waits until a function returns something true."""
        end = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < end, f"{self.queue()}\n{self.logs()}"
            time.sleep(0.1)

    def queue(self) -> str:
        return self.call("squeue", "-r", "-o", "%i %P %T %r", check=False).stdout

    def logs(self) -> str:
        return (self.folder / "slurmctld.log").read_text()[-3000:]

    def kill_node(self, name: str) -> None:
        """Kills the daemon of a node and all processes of its jobs, as if it lost power."""
        jobs = [pid for pid in pids() if self.is_of_job(pid, name)]
        # A job's first process is the child of a daemon that watches the job.
        parents = {int(stat(pid)[1]) for pid in jobs if stat(pid)} - set(jobs) - {0, 1}
        watchers = [pid for pid in parents if read(f"/proc/{pid}/cmdline").startswith("slurmstepd")]
        for pid in (int((self.folder / f"slurmd.{name}.pid").read_text()), *watchers, *jobs):
            kill(pid)

    def is_of_job(self, pid: int, name: str) -> bool:
        """Whether a process belongs to a job on a node of this cluster."""
        variables = read(f"/proc/{pid}/environ").split("\0")
        conf = self.variables["SLURM_CONF"]
        return f"SLURMD_NODENAME={name}" in variables and f"SLURM_CONF={conf}" in variables

    def stop(self) -> None:
        """Ends the jobs and the daemons, by their process ids."""
        self.call("scancel", "--user=root", check=False)
        end = time.monotonic() + 20
        while self.queue().count("\n") > 1 and time.monotonic() < end:
            time.sleep(0.2)
        files = [*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid"]
        for file in [*files, self.folder / "munge" / "pid"]:
            if file.is_file():
                kill(int(file.read_text()), number=signal.SIGTERM)


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def stat(pid: int) -> list[str]:
    """The state of a process, the id of its parent and more; [] if it has ended."""
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def kill(pid: int, *, number: int = signal.SIGKILL) -> None:
    """Sends a signal and waits until the process has ended; after ten seconds it is killed."""
    end = time.monotonic() + 10
    try:
        os.kill(pid, number)
        while stat(pid)[:1] not in ([], ["Z"]):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
    except ProcessLookupError:
        pass


def running(folder: Path) -> Iterator[Cluster]:
    """A cluster whose files are in a folder, for a fixture."""
    if why := missing():
        if "slurm" in os.environ.get("CERL_REQUIRE", ""):
            pytest.fail(f"CERL_REQUIRE says that SLURM has to be tested here: {why}")
        pytest.skip(why)
    cluster = Cluster(folder, port=21_000 + os.getpid() % 2_000 * 5)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
