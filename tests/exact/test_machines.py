"""Machines that die: network namespaces stand for machines, real torchruns meet over a bridge, and what is left of them ends the run.

Needs root and iproute2's `ip`. Where they are missing the tests say so, or fail if LAB_NAMESPACES=required asks for them, as CI does.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .conftest import ROOT, command, finish

PORT = 29500
CONF = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
STORE = "import signal, sys, torch.distributed as d; s = d.TCPStore(sys.argv[1], int(sys.argv[2]), is_master=True); signal.pause()"
STEPS = {"data__batch_size": "24", "trainer__steps": "300", "trainer__log_every": "5", "trainer__save_every": "20"}


def ip(*words: str, check: bool = True) -> str:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True).stdout


@dataclass
class Machine:
    """A network namespace with an address on the bridge."""

    name: str
    address: str
    cable: str
    """The end of its cable at the bridge."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, words: list[str], folder: Path) -> subprocess.Popen[bytes]:
        """Start a process on this machine; what it prints goes to a file named after the machine."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        with (folder / f"{self.name}.txt").open("ab") as output:
            inside = ["ip", "netns", "exec", self.name, *words]
            process = subprocess.Popen(inside, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    @property
    def pids(self) -> list[int]:
        """All processes that run on it."""
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """SIGKILL for all that runs on it."""
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # its parent was faster
        for process in self.processes:
            process.wait(60)

    def unplug(self) -> None:
        """Take it from the network, so that nobody is told of anything any more."""
        ip("-n", self.name, "link", "set", "eth0", "down")


@pytest.fixture
def machines() -> Iterator[Callable[[int], list[Machine]]]:
    """Makes a number of machines on one bridge; all is gone at the end, however the test ends."""
    missing = "root" if os.geteuid() else "iproute2's `ip`" if shutil.which("ip") is None else ""
    if missing and os.environ.get("LAB_NAMESPACES") == "required":
        pytest.fail(f"LAB_NAMESPACES=required, and {missing} is missing")
    if missing:
        pytest.skip(f"network namespaces need {missing}: no machine dies here")
    bridge, made = f"br{os.getpid()}", []

    def make(count: int) -> list[Machine]:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number in range(count):
            made.append(Machine(f"lab{os.getpid()}-{number}", f"10.83.0.{number + 1}", f"v{os.getpid()}-{number}"))
            plug(made[-1], bridge)
        return made

    yield make
    for machine in made:
        machine.kill()
        ip("link", "delete", machine.cable, check=False)  # with the namespace it would go too, but some time later
        ip("netns", "delete", machine.name, check=False)
    ip("link", "delete", bridge, check=False)


def plug(machine: Machine, bridge: str) -> None:
    """Connect a new machine to the bridge."""
    ip("netns", "add", machine.name)
    ip("link", "add", machine.cable, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
    ip("link", "set", machine.cable, "master", bridge, "up")
    ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        ip("-n", machine.name, "link", "set", device, "up")


def train(machine: Machine, nodes: str, meet: Machine, folder: Path, **changes: str) -> subprocess.Popen[bytes]:
    """The command that is started on every machine, and again after anything that went wrong."""
    conf = f"{CONF},is_host={int(machine is meet)}"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{meet.address}:{PORT}", "--rdzv-conf", conf]
    elastic = ["--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", "5", *meeting, "--local-addr", machine.address]
    script = command("--run-dir", "run", "--resume", "auto", **(STEPS | changes))[1:]
    return machine.start([sys.executable, str(ROOT / "scripts" / "torchrun.py"), *elastic, *script], folder)


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen[bytes]], seconds: float = 90) -> None:
    """Watch running processes until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), [process.returncode for process in processes]
        try:
            processes[0].wait(0.01)
        except subprocess.TimeoutExpired:
            continue


def rows(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def sizes(run: Path) -> list[int]:
    """On how many processes the run was at each of its starts."""
    return [start["processes"] for start in json.loads((run / "environment.json").read_text())["starts"]]


def of_main(machines: list[Machine], run: Path) -> Machine:
    """The machine with the main process, which has the run's lock."""
    pid = json.loads((run / "owner.json").read_text())["pid"]
    return next(machine for machine in machines if pid in machine.pids)


def under_way(run: Path) -> Callable[[], bool]:
    """Whether the run is well past a checkpoint."""
    return lambda: len(rows(run)) >= 11


def assert_as_on_one(run: Path, folder: Path, **changes: str) -> None:
    """Every row is that of a run on one process that nothing has interrupted."""
    finish(command("--run-dir", "single", **(STEPS | changes)), folder)
    single = rows(folder / "single")
    assert [row["step"] for row in rows(run)] == [row["step"] for row in single]
    for one, many in zip(single, rows(run), strict=True):
        assert many["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)


def told(folder: Path) -> str:
    """What all machines have printed."""
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.txt")))


def test_the_last_of_two_machines_ends_the_run_alone(machines: Callable[[int], list[Machine]], tmp_path: Path) -> None:
    head, *both = machines(3)
    head.start([sys.executable, "-c", STORE, head.address, str(PORT)], tmp_path)
    started = [train(machine, "1:2", head, tmp_path) for machine in both]
    run = tmp_path / "run"
    wait_until(under_way(run), started)
    lost = of_main(both, run)
    lost.kill()
    left = started[both.index(lost) - 1]
    assert left.wait(60) == 0, told(tmp_path)
    assert sizes(run) == [2, 1]
    assert_as_on_one(run, tmp_path)


@pytest.mark.slow
def test_two_of_three_machines_go_on_and_the_third_comes_back(machines: Callable[[int], list[Machine]], tmp_path: Path) -> None:
    """The lost one is that of the main process, which all others know by its address."""
    run, long = tmp_path / "run", {"trainer__steps": "3000", "trainer__log_every": "20", "trainer__save_every": "100"}
    long["optimizer__lr"] = "1e-4"  # so many steps at the usual rate make 5e-4 of what is rounded differently
    head, *three = machines(4)
    head.start([sys.executable, "-c", STORE, head.address, str(PORT)], tmp_path)
    started = [train(machine, "2:3", head, tmp_path, **long) for machine in three]
    wait_until(under_way(run), started)
    lost = of_main(three, run)
    lost.kill()
    del started[three.index(lost)]
    wait_until(lambda: sizes(run) == [3, 2], started)
    before = len(rows(run))
    wait_until(lambda: len(rows(run)) >= before + 10, started)
    started.append(train(lost, "2:3", head, tmp_path, **long))
    assert [process.wait(180) for process in started] == [0, 0, 0], told(tmp_path)
    assert sizes(run)[:2] == [3, 2]
    assert sizes(run)[-1] == 3
    assert_as_on_one(run, tmp_path, **long)


@pytest.mark.slow
def test_a_machine_without_power_is_noticed_by_its_silence(machines: Callable[[int], list[Machine]], tmp_path: Path) -> None:
    """Unplugged first, it closes no connection: those left learn of it when the system gives up sending, told to do so soon."""
    head, *three = machines(4)
    for machine in three:
        ip("netns", "exec", machine.name, "sysctl", "-qw", "net.ipv4.tcp_retries2=5")
    head.start([sys.executable, "-c", STORE, head.address, str(PORT)], tmp_path)
    started = [train(machine, "2:3", head, tmp_path) for machine in three]
    run = tmp_path / "run"
    wait_until(under_way(run), started)
    three[1].unplug()
    three[1].kill()
    assert [started[place].wait(120) for place in (0, 2)] == [0, 0], told(tmp_path)
    assert sizes(run) == [3, 2]
    assert_as_on_one(run, tmp_path)


@pytest.mark.slow
def test_without_the_machine_where_all_meet_the_others_end_and_the_same_command_goes_on(
    machines: Callable[[int], list[Machine]], tmp_path: Path
) -> None:
    three, run = machines(3), tmp_path / "run"
    started = [train(machine, "2:3", three[0], tmp_path) for machine in three]
    wait_until(under_way(run), started)
    three[0].kill()
    assert [process.wait(120) for process in started[1:]] == [1, 1], told(tmp_path)
    started = [train(machine, "2:3", three[1], tmp_path) for machine in three[1:]]
    assert [process.wait(120) for process in started] == [0, 0], told(tmp_path)
    assert sizes(run) == [3, 2]
    assert_as_on_one(run, tmp_path)
