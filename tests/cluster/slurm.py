"""A real Slurm with two nodes on this machine: munged, slurmctld and two slurmd."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


class Cluster:
    """`call` runs one of Slurm's commands against it. Raises RuntimeError where it does not start."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, []
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), ports=_free_ports(3), folder=folder))
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:
            os.makedirs("/run/munge", exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            self._start("munged", "--foreground", user="munge")
        self._start("slurmctld", "-D")
        for node in ("n0", "n1"):
            (folder / f"spool-{node}").mkdir()
            self._start("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 60
        while self._states() != {"idle"}:
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
                raise RuntimeError(f"Slurm's nodes are {self._states()}, not idle\n{logs}")
            time.sleep(0.5)

    def _states(self) -> set[str]:
        return set(
            subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True, env=self.environment).stdout.split()
        )

    def _start(self, *command: str, user: str | None = None) -> None:
        with open(self.folder / f"{len(self.daemons)}-{command[0]}.log", "w") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, user=user, group=user))

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**self.environment, **environment})
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.call("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, timeout: float = 240) -> dict[str, str]:
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {number} is {job['JobState']}, not {states}: {job}")
            time.sleep(0.5)
        return job

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(30)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
