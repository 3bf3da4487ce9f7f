"""A real Slurm on one machine, as root: each node in namespaces of its own, so that one may lose its power or its link.

    this machine         munged, mariadbd, slurmdbd, slurmctld, and the commands of whoever logs in
    a bridge             10.X.Y.254 here, 10.X.Y.1 … for the nodes
    n1, n2, …            slurmd in its own network, process, mount and host-name namespaces; the disk is shared

What belongs to a node dies with the first process of its namespace.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fmscale.distributed import free_port

PACKAGES = "munge slurm-wlm slurmdbd mariadb-server-core mariadb-client-core iproute2"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd", "mariadb-install-db", "ip", "unshare")
START_S = 60
SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for credentials of its last start to expire: 120 s unless told otherwise; 5 is the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
GresTypes=gpu
"""
NODE = "NodeName={name} NodeAddr={address} Port=6818 CPUs=128 RealMemory=2000000 Gres=gpu:8 State=UNKNOWN\n"
PARTITION = (
    "PartitionName={name} Nodes=ALL Default={default} DefMemPerNode=100 MaxTime=INFINITE "
    "PriorityTier={tier} PreemptMode={mode}\n"
)
DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr={address}
DbdPort={dbd_port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""
SQL = """\
CREATE DATABASE slurm;
CREATE USER 'slurm'@'localhost' IDENTIFIED BY '{password}';
GRANT ALL ON slurm.* TO 'slurm'@'localhost';
"""
SLURMD = """\
mount --bind {folder}/hosts /etc/hosts && hostname {name} || exit 1
while :; do  # 22.05 crashes now and then where several steps start at once
    slurmd -D -f {folder}/slurm.conf -N {name}; code=$?
    [ $code = 134 ] || [ $code = 139 ] || exit $code
done
"""


def missing() -> str:
    """What keeps a cluster from being started here, and what to do; empty where nothing does."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    if any(shutil.which(program, path=search_path()) is None for program in PROGRAMS):
        return f"apt-get install -y --no-install-recommends {PACKAGES}"
    probe = ("unshare", "--uts", "--mount", "--pid", "--net", "--fork", "ip", "link", "add", "type", "bridge")
    done = subprocess.run(probe, env=os.environ | {"PATH": search_path()}, capture_output=True, text=True, check=False)
    return f"this machine refuses namespaces and networks to nodes: {done.stderr.strip()}" if done.returncode else ""


def search_path() -> str:
    """Where programs are, those of the administrator too."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class CommandError(Exception):
    """A command of Slurm's has failed."""


class Cluster:
    """A running Slurm; `stop` ends it.

    Args:
        folder: for everything; short, since sockets are in it, and of root alone.
        nodes: so many, n1 …; each says that it has 128 cores and 8 GPUs.
        partitions: name -> priority tier, the default one first; jobs in `low` are preempted: a signal, 30 s, requeued.

    Attributes:
        environment: of whoever logs in.
    """

    def __init__(self, folder: Path, nodes: int, partitions: dict[str, int]) -> None:
        self.folder, self.tag = folder, secrets.token_hex(2)
        self.subnet = f"10.{random.randrange(64, 250)}.{random.randrange(1, 250)}"
        self.nodes = {f"n{i}": f"{self.subnet}.{i}" for i in range(1, nodes + 1)}
        self.environment = os.environ | {"PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.links: list[str] = []
        try:
            self._connect()
            self._configure(partitions)
            self._start()
        except BaseException:
            self.stop()
            raise

    def __call__(self, *command: str | Path) -> str:
        """What a command prints, which must go well."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise CommandError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def _connect(self) -> None:
        """A bridge, and a cable from it to each node."""
        bridge = f"fm{self.tag}"
        self("ip", "link", "add", bridge, "type", "bridge")
        self.links.append(bridge)
        self("ip", "address", "add", f"{self.subnet}.254/24", "dev", bridge)
        self("ip", "link", "set", bridge, "up")
        for name, address in self.nodes.items():
            space = f"{bridge}-{name}"
            self("ip", "netns", "add", space)
            self("ip", "link", "add", self.cable(name), "type", "veth", "peer", "name", "eth0", "netns", space)
            self("ip", "link", "set", self.cable(name), "master", bridge, "up")
            self("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                self("ip", "-n", space, "link", "set", link, "up")

    def cable(self, node: str) -> str:
        """The bridge's end of a node's cable."""
        return f"fm{self.tag}{node}"

    def _configure(self, partitions: dict[str, int]) -> None:
        values: dict[str, Any] = {
            "folder": self.folder,
            "host": socket.gethostname(),
            "address": f"{self.subnet}.254",
            "port": free_port(),
            "dbd_port": free_port(),
            "sql_port": free_port(),
            "password": secrets.token_hex(12),
        }
        self.address, self.dbd_port, self.sql_port = (values[name] for name in ("address", "dbd_port", "sql_port"))
        conf = SLURM_CONF.format(**values)
        conf += "".join(NODE.format(name=name, address=address) for name, address in self.nodes.items())
        for name, tier in partitions.items():
            mode = "REQUEUE GraceTime=30" if name == "low" else "OFF"
            default = "YES" if name == next(iter(partitions)) else "NO"
            conf += PARTITION.format(name=name, tier=tier, mode=mode, default=default)
        hosts = {"localhost": "127.0.0.1", values["host"]: values["address"], **self.nodes}
        self._write("slurm.conf", conf)
        self._write("hosts", "".join(f"{address} {name}\n" for name, address in hosts.items()))
        self._write("slurmdbd.conf", DBD_CONF.format(**values))
        self._write("make.sql", SQL.format(**values))
        self._write("munge.key", secrets.token_hex(64))
        for number in range(8):  # Slurm wants character devices
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        self._write("gres.conf", f"Name=gpu File={self.folder}/gpu[0-7]\n")

    def _write(self, name: str, text: str) -> None:
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(descriptor, text.encode())
        os.close(descriptor)

    def _start(self) -> None:
        folder = self.folder
        key, munge_socket = f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"
        files = (f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/seed")
        self._daemon("munged", "munged", "--foreground", "--force", key, munge_socket, *files)
        options = ("--no-defaults", "--user=root", f"--datadir={folder}/db")
        self("mariadb-install-db", *options, "--skip-test-db")
        address = ("--bind-address=127.0.0.1", f"--port={self.sql_port}", f"--socket={folder}/sql.socket")
        quick = (f"--init-file={folder}/make.sql", "--innodb-flush-method=nosync", "--innodb-buffer-pool-size=64M")
        self._daemon("mariadbd", "mariadbd", *options, *address, *quick)
        wait_until(lambda: _listens("127.0.0.1", self.sql_port), "mariadbd")
        self._daemon("slurmdbd", "slurmdbd", "-D")
        wait_until(lambda: _listens(self.address, self.dbd_port), "slurmdbd")
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        wait_until(lambda: "is UP" in self("scontrol", "ping"), "slurmctld")
        for node in self.nodes:
            self.power_on(node)
        wait_until(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "nodes")

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def states(self) -> dict[str, str]:
        """What Slurm says of each node."""
        return dict(sorted(line.split() for line in set(self("sinfo", "-h", "-N", "-o", "%N %T").splitlines())))

    def power_on(self, node: str) -> None:
        """Start a node, or bring it back."""
        spaces = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")
        script = SLURMD.format(folder=self.folder, name=node)
        into = ("nsenter", f"--net=/run/netns/fm{self.tag}-{node}")
        self._daemon(node, *into, *spaces, "bash", "-c", script)

    def cut_power(self, node: str) -> None:
        """Every process of a node is gone at once."""
        self.daemons[node].kill()
        self.daemons.pop(node).wait()

    def cut_link(self, node: str) -> None:
        """Nobody reaches a node any more, and its processes run on."""
        self("ip", "link", "set", self.cable(node), "down")

    def mend_link(self, node: str) -> None:
        """Undo `cut_link`."""
        self("ip", "link", "set", self.cable(node), "up")

    def inside(self, node: str) -> Sequence[str]:
        """What to put before a command that is to run within a node."""
        first = Path(f"/proc/{self.daemons[node].pid}/task/{self.daemons[node].pid}/children").read_text().split()[0]
        return ("nsenter", "--target", first, "--all")

    def stop(self) -> None:
        """End everything that was started, and remove the network."""
        with suppress(Exception):
            self("scancel", "--full", "--user=root")
        for name, daemon in reversed(self.daemons.items()):
            daemon.send_signal(signal.SIGKILL if name in self.nodes else signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
            daemon.wait()
        for node in self.nodes:
            subprocess.run(["ip", "netns", "delete", f"fm{self.tag}-{node}"], check=False, capture_output=True)
        for link in self.links:
            subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 1).close()
    except OSError:
        return False
    return True


def wait_until(reached: Callable[[], bool], what: str, seconds: float = START_S, every_s: float = 0.2) -> None:
    """Wait for something that is to happen within so many seconds; commands that fail meanwhile are asked again."""
    deadline = time.monotonic() + seconds
    while True:
        failure = ""
        try:
            if reached():
                return
        except CommandError as error:
            failure = str(error)
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what} {failure}"
        time.sleep(every_s)
