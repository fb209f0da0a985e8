"""How schedulers start a run and what they are told by its exit code: scripts/torchrun.py, scripts/slurm.sbatch, docs/many-machines.md.

SLURM itself is not here: programs of its names stand in, which start the same processes and pass the same signals on.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.exact.conftest import SETTINGS
from tests.exact.test_kill import size, wait_until
from tests.scripts.test_scripts import ROOT

SRUN_RECORDS = """#!/bin/sh
for word in "$@"; do echo "$word"; done > srun.txt
exit $SRUN_STATUS
"""
SRUN_RUNS = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = [word for place, word in enumerate(sys.argv[1:]) if not all(before.startswith("--") for before in sys.argv[1 : place + 2])]
tasks = [subprocess.Popen(words) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") for number in 1 2; do echo localhost; done ;;
*) echo "$@" >> scontrol.txt ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder that looks like the checkout, with stand-ins for SLURM's commands in bin/."""
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


def stand_in(cluster: Path, name: str, text: str) -> None:
    path = cluster / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def submit(cluster: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    """What SLURM does with a batch script, on two machines."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "SLURM"))}
    known |= {"PATH": f"{cluster / 'bin'}:{known['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    known |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost", **variables}
    script = ["bash", "scripts/slurm.sbatch", *words]
    return subprocess.Popen(script, cwd=cluster, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (2, False), (75, True)])
def test_a_job_goes_back_into_the_queue_when_its_run_was_stopped_and_only_then(cluster: Path, status: int, again: bool) -> None:
    stand_in(cluster, "srun", SRUN_RECORDS)
    stand_in(cluster, "scontrol", SCONTROL)
    words = ["scripts/train_vae.py", "--run-dir", "a folder", "--resume", "auto"]
    job = submit(cluster, *words, SRUN_STATUS=str(status), SLURM_JOB_ID="123456", SLURM_GPUS_ON_NODE="4", SLURM_RESTART_COUNT="2")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == status, output
    told = (cluster / "scontrol.txt").read_text() if (cluster / "scontrol.txt").exists() else ""
    assert told == ("requeue 123456\n" if again else "")
    started = (cluster / "srun.txt").read_text().splitlines()
    assert started[-5:] == words
    options = dict(pairwise(started))
    assert (options["--nnodes"], options["--nproc-per-node"]) == ("2", "4")
    assert (options["--rdzv-id"], options["--rdzv-endpoint"]) == ("123456.2", "localhost:23456")


def test_a_job_asks_slurm_to_be_told_and_to_be_started_again() -> None:
    text = (ROOT / "scripts/slurm.sbatch").read_text()
    asked = re.findall(r"^#SBATCH (\S+)$", text.split("\nset -u")[0], re.M)
    assert {"--requeue", "--signal=TERM@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(asked)
    longest = int(re.search(r"--shutdown-timeout (\d+)", text)[1])  # type: ignore[index]
    assert longest < 120


def test_a_job_without_a_script_says_how_it_is_used(cluster: Path) -> None:
    job = submit(cluster)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert output.startswith("usage: sbatch")


@pytest.mark.slow
def test_a_preempted_job_saves_and_its_next_start_ends_it(cluster: Path) -> None:
    stand_in(cluster, "srun", SRUN_RUNS)
    stand_in(cluster, "scontrol", SCONTROL)
    options = [word for key, value in (SETTINGS | {"trainer.steps": "600"}).items() for word in (f"--{key}", value)]
    words, run = ["scripts/train_vae.py", *options, "--run-dir", "run", "--resume", "auto"], cluster / "run"
    job = submit(cluster, *words)
    assert wait_until(lambda: size(run / "metrics.jsonl") > 0, job)
    os.kill(int((cluster / "srun.pid").read_text()), signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output
    assert (cluster / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"
    again = submit(cluster, *words, SLURM_RESTART_COUNT="1")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 2]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 600


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(75)", 75), pytest.param("os.kill(os.getpid(), 9)", 137, marks=pytest.mark.slow)])
def test_torchrun_ends_as_the_run_did(tmp_path: Path, ending: str, status: int) -> None:
    (tmp_path / "train.py").write_text(f"import os, sys\n{ending}\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/torchrun.py"), "--standalone", "--nproc-per-node", "1", "train.py"], cwd=tmp_path, timeout=120
    )
    assert done.returncode == status


# What stands in the documentation


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs/many-machines.md").read_text(), re.M | re.S)
    return [text for of, text in found if of == language]


def test_the_kubernetes_job_starts_again_after_75_and_fails_after_a_mistake() -> None:
    documents = [document for block in blocks("yaml") for document in yaml.safe_load_all(block)]
    service, job = (next(document for document in documents if document["kind"] == kind) for kind in ("Service", "Job"))
    spec: dict[str, Any] = job["spec"]
    pod = spec["template"]["spec"]
    assert (job["apiVersion"], spec["completionMode"], pod["restartPolicy"]) == ("batch/v1", "Indexed", "Never")
    rules = {tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert rules == {(2,): "FailJob", (75,): "Ignore"}
    assert any("DisruptionTarget" in str(rule) and rule["action"] == "Ignore" for rule in spec["podFailurePolicy"]["rules"])
    # Pods find the first one by its name, which a service without an address gives them.
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    words = container["command"]
    options = dict(pairwise(words))
    assert options["--rdzv-endpoint"].partition(":")[0] == f"{name}-0.{pod['subdomain']}"
    assert int(options["--nnodes"].partition(":")[2]) == spec["completions"] == spec["parallelism"]
    assert words[1] == "scripts/torchrun.py"
    assert options["--resume"] == "auto"
    # The run lies on a disk that all pods share, and a pod may take as long to end as its processes may to save.
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert options["--run-dir"].startswith(mount["mountPath"])
    assert volume["persistentVolumeClaim"]
    assert pod["terminationGracePeriodSeconds"] > int(options["--shutdown-timeout"])


def test_the_commands_of_the_page_name_scripts_and_presets_that_exist() -> None:
    commands = [line for block in blocks("") for line in block.splitlines() if line and not line.startswith(" ")]
    named = {
        word for line in commands for word in shlex.split(line, comments=True) if word.startswith(("scripts/", "configs/", "benchmarks/"))
    }
    assert {"scripts/torchrun.py", "scripts/slurm.sbatch"} <= named
    assert not [word for word in named if not (ROOT / word).exists()]
