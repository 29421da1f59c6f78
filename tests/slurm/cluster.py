"""A real Slurm on one machine: a controller and two node daemons on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
# The states that a job ends in. What else `scontrol` shows, such as SIGNALING, goes by.
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
# A node refuses a job while it still clears up after that job's last start.
_CLEARING_UP = timedelta(seconds=3)
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
JobRequeue=1
KillWait=20
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None if it can."""
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} here: apt-get install slurm-wlm munge"
    return None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


class Cluster:
    """The daemons, and the commands of a user who talks to them.

    Args:
        folder: of the configuration, the state and the logs; short, as it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("munge", "state"):
            (folder / name).mkdir()
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(folder=folder, host=host, ports=_free_ports(3))
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        try:
            self._start_munge()
            self._start("slurmctld", "-D")
            for node in ("n1", "n2"):
                (folder / f"spool-{node}").mkdir()
                self._start("slurmd", "-D", "-N", node)
            self._wait_for_nodes()
        except BaseException:
            self.close()
            raise

    def command(self, *words: object, folder: Path | None = None, **variables: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=folder, env={**self.environment, **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one task of an array."""
        return _fields(self.command("scontrol", "--oneliner", "show", "job", job))

    def hurry(self) -> None:
        """Requeued jobs are held back for two minutes; not here."""
        for line in self.command("scontrol", "--oneliner", "show", "job").splitlines():
            facts = _fields(line)
            if (facts.get("JobState"), facts.get("Reason")) != ("PENDING", "BeginTime"):
                continue
            until = facts["EligibleTime"]
            if until == "Unknown":
                continue
            if datetime.fromisoformat(until) > datetime.now() + 2 * _CLEARING_UP:
                job = facts["JobId"]
                if "ArrayTaskId" in facts:
                    job = f"{facts['ArrayJobId']}_{facts['ArrayTaskId']}"
                self.command(
                    "scontrol", "update", f"JobId={job}", f"StartTime=now+{_CLEARING_UP.seconds}"
                )

    def wait(self, job: str, seconds: float = 120) -> dict[str, str]:
        """A job's facts when it is over, all its restarts included."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            facts = self.facts(job)
            if facts["JobState"] in ENDED:
                return facts
            self.hurry()
            time.sleep(0.3)
        raise TimeoutError(f"{self.facts(job)}")

    def close(self) -> None:
        subprocess.run(
            ["scancel", "--signal=KILL", "--user=root"], env=self.environment, check=False
        )
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *words: str, user: str | None = None) -> None:
        log = open(self.folder / f"{words[0]}-{len(self._daemons)}.out", "wb")  # noqa: SIM115
        self._daemons.append(
            subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, user=user)
        )

    def _start_munge(self) -> None:
        """As its own user, with a key and a socket of its own."""
        place = self.folder / "munge"
        (place / "key").write_bytes(os.urandom(128))
        (place / "key").chmod(0o400)
        for path in (place, place / "key"):
            shutil.chown(path, "munge", "munge")
        self._start(
            "munged", "--foreground", "--force", f"--socket={place}/socket",
            f"--key-file={place}/key", f"--pid-file={place}/pid", f"--seed-file={place}/seed",
            user="munge",
        )  # fmt: skip
        for _ in range(100):
            if (place / "socket").exists():
                return
            time.sleep(0.1)
        raise TimeoutError(f"munged did not start: {(self.folder / 'munged-0.out').read_text()}")

    def _wait_for_nodes(self) -> None:
        state = ""
        for _ in range(150):
            done = subprocess.run(
                ["sinfo", "--noheader", "--Node", "--partition=all", "--format=%T"],
                env=self.environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            state = done.stdout + done.stderr
            if done.stdout.split() == ["idle", "idle"]:
                return
            time.sleep(0.2)
        raise TimeoutError(f"the nodes did not come up: {state}")
