"""Machines of a small cluster on one: network namespaces on a bridge, each with its own name, processes and sshd.

A host has an interface `eth0`, a host name, process numbers, `/dev/shm` and, where asked for, folders of its own under
a path that the others have too. Its processes end with it. What a run that was killed has left is removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from jobs import PATIENCE

PREFIX = "dsllm"
NAMES = ("red", "blue", "green")
ARITHMETIC = ("ATEN_", "DNNL_", "ONEDNN_", "MKL_ENABLE_")  # variables that choose instructions, so the last bits
CONFIG = """
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PrintMotd no
"""
CLIENT = """
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ServerAliveInterval 1
    ServerAliveCountMax 3
"""


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    needed = {
        "ip": "iproute2",
        "sshd": "openssh-server",
        "ssh": "openssh-client",
        "pdsh": "pdsh",
        "nsenter": "util-linux",
    }
    lacking = [package for command, package in needed.items() if _find(command) is None]
    if lacking:
        return f"apt-get install {' '.join(lacking)}"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    found = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if found.returncode == 0:
        found = subprocess.run(
            ["ip", "netns", "exec", probe, "unshare", "-umpf", "true"], capture_output=True, text=True
        )
        subprocess.run(["ip", "netns", "delete", probe])
    return f"this machine forbids namespaces: {found.stderr.strip()}" if found.returncode else None


def _find(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def remove_leftovers() -> None:
    """Take down the hosts of test runs that are no more."""
    for line in _run("ip", "netns", "list").splitlines():
        found = re.match(rf"({PREFIX}-(\d+)-\w+)", line)
        if found and not psutil.pid_exists(int(found[2])):
            _take_down(found[1])


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _take_down(space: str) -> None:
    for _ in range(1000):
        pids = [int(pid) for pid in _run("ip", "netns", "pids", space).split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            break
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "delete", space], capture_output=True)


class Host:
    """One machine: `start` boots it, `kill` takes its power, `cut` and `mend` are for its cable."""

    def __init__(self, cluster: Cluster, number: int):
        self.cluster, self.number = cluster, number
        self.name, self.address = NAMES[number], f"10.77.0.{number + 1}"
        self.space = f"{PREFIX}-{os.getpid()}-{self.name}"
        self.folder = cluster.folder / self.name
        self.folder.mkdir()
        _run("ip", "netns", "add", self.space)
        port = ["type", "veth", "peer", "name", "eth0", "netns", self.space]
        _run("ip", "-n", cluster.switch, "link", "add", f"port{number}", *port)
        _run("ip", "-n", cluster.switch, "link", "set", f"port{number}", "master", "bridge", "up")
        _run("ip", "-n", self.space, "address", "add", f"{self.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _run("ip", "-n", self.space, "link", "set", interface, "up")
        (self.folder / "sshd").write_text(CONFIG.format(address=self.address, folder=cluster.folder))

    def start(self) -> None:
        private = "".join(
            f"mkdir -p {self.folder}/own{path}; mount --bind {self.folder}/own{path} {path}; "
            for path in self.cluster.private
        )
        script = (
            f"hostname {self.name}; mount --bind {self.cluster.folder}/hosts /etc/hosts; "
            f"mount -t tmpfs -o size=1g tmpfs /dev/shm; {private} mkdir -p /run/sshd; "
            f"exec {_find('sshd')} -D -e -f {self.folder}/sshd"
        )
        log = open(self.folder / "sshd.log", "a")  # noqa: SIM115
        unshare = [
            "unshare",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-ec",
            script,
        ]
        self._outside = subprocess.Popen(
            ["ip", "netns", "exec", self.space, *unshare], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        end = time.monotonic() + PATIENCE
        while True:
            found = psutil.Process(self._outside.pid).children()
            if found and found[0].name() == "sshd" and self._answers():
                break
            assert self._outside.poll() is None and time.monotonic() < end, (self.folder / "sshd.log").read_text()
            time.sleep(0.05)
        self._init = found[0]

    def _answers(self) -> bool:
        return (
            subprocess.run(self.inside("bash", "-c", f"</dev/tcp/{self.address}/22"), capture_output=True).returncode
            == 0
        )

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        init = psutil.Process(self._outside.pid).children()[0].pid
        return ["nsenter", "-t", str(init), "-n", "-u", "-m", "-p", "--wd=.", *command]

    def processes(self) -> list[psutil.Process]:
        """Those on this host that are none of its sshd's."""
        found = []
        for pid in _run("ip", "netns", "pids", self.space).split():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(pid))
                if process.name() not in ("sshd", "unshare", "ip") and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """All its processes end at once; the network connections of a machine without power stay open."""
        self.cut()
        self._init.kill()
        self._outside.wait(PATIENCE)

    def cut(self) -> None:
        _run("ip", "-n", self.cluster.switch, "link", "set", f"port{self.number}", "down")

    def mend(self) -> None:
        _run("ip", "-n", self.cluster.switch, "link", "set", f"port{self.number}", "up")


class Cluster:
    """Hosts that are up while the block runs. private: folders that each host has for itself."""

    def __init__(self, folder: Path, count: int, private: tuple[Path, ...] = ()):
        self.folder, self.count, self.private = folder, count, private
        self.switch = f"{PREFIX}-{os.getpid()}-switch"
        self.hosts: list[Host] = []

    def __enter__(self) -> Cluster:
        remove_leftovers()
        self.folder.mkdir(parents=True)
        for name in ("host_key", "key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        (self.folder / "ssh_config").write_text(CLIENT.format(folder=self.folder))
        try:
            _run("ip", "netns", "add", self.switch)
            _run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self.switch, "link", "set", "bridge", "up")
            for number in range(self.count):
                self.hosts.append(Host(self, number))
            lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self.hosts)]
            (self.folder / "hosts").write_text("\n".join(lines) + "\n")
            for host in self.hosts:
                host.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for space in [*(host.space for host in self.hosts), self.switch]:
            _take_down(space)

    def launch(self, script: Path, arguments: list[str], folder: Path, **env):
        """Start `deepspeed --hostfile` on the first host; returns the process."""
        folder.mkdir(exist_ok=True)
        first = self.hosts[0]
        (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in self.hosts))
        settings = {
            "GLOO_SOCKET_IFNAME": "eth0",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": 1,
            "OMP_NUM_THREADS": 1,
            **{name: value for name, value in os.environ.items() if name.startswith(ARITHMETIC)},
            **env,
        }
        (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        command = [
            *(str(Path(sys.executable).parent / "deepspeed"), "--hostfile", "hostfile", "--no_ssh_check"),
            *("--master_addr", first.address, "--master_port", "29500", str(script), *arguments),
        ]
        return subprocess.Popen(
            first.inside(*command),
            cwd=folder,
            env={**os.environ, "PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh_config", "DS_ACCELERATOR": "cpu"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def free(self, seconds: float) -> bool:
        """Whether all processes on all hosts end within some seconds."""
        end = time.monotonic() + seconds
        while any(host.processes() for host in self.hosts):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True


def here() -> str:
    return socket.gethostname()
