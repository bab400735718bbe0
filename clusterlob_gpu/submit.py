"""Run a command itself as a batch job, so that the machine it was typed on may go away.

The job is small: it runs `clusterlob COMMAND --workers PLACE`, and that starts the workers' own jobs.
Whatever ends it early (walltime, preemption, a lost node) queues the same command again, which goes on
from the finished days.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clusterlob_gpu.config import read_yaml
from clusterlob_gpu.errors import ClusterlobError, InputError
from clusterlob_gpu.places import (
    KubernetesPlace,
    SlurmPlace,
    import_extra,
    one_line,
    place_file,
    pod_access,
    pod_resources,
    pod_volumes,
    read_place,
    slurm_time,
)
from clusterlob_gpu.schema import US_PER_SECOND

_COMMANDS = ("run", "sweep", "label")
_MAIN = "from clusterlob_gpu.cli import main; main()"
_PLACE_FOLDER = "/etc/clusterlob"
"""Where the driver's pod finds the file of its place."""


def render_submission(to: str, command: Sequence[str]) -> str:
    """What `submit` would hand in: an sbatch script, or manifests of Kubernetes.

    `to` names a place as `--workers` does, `command` is a command of clusterlob without `--workers`.
    Raises InputError where the place has no queue, or the command cannot be submitted.
    """
    _check_command(command)
    place = read_place(to)
    if isinstance(place, SlurmPlace):
        return _slurm_script(place, place_file(to), command)
    if isinstance(place, KubernetesPlace):
        return yaml.safe_dump_all(_kubernetes_manifests(place, place_file(to), command), sort_keys=False)
    raise InputError(f"--to {to}: a place of kind {place.kind} has no queue; slurm and kubernetes have one")


def submit(to: str, command: Sequence[str]) -> str:
    """Hand the command in and return the id of its SLURM job, or the name of its Kubernetes Job.

    Raises InputError as `render_submission` does and where SLURM refuses the job, ClusterlobError where
    Kubernetes does.
    """
    text = render_submission(to, command)
    place = read_place(to)
    if isinstance(place, SlurmPlace):
        # SLURM ends a job without a word when the folder of its output is missing.
        Path(place.log_directory).mkdir(parents=True, exist_ok=True)
        return _sbatch(text)
    return _apply(list(yaml.safe_load_all(text)))


def _check_command(command: Sequence[str]) -> None:
    if not command or command[0] not in _COMMANDS:
        given = shlex.join(command) or "nothing"
        raise InputError(f"submit: {given}: only {', '.join(_COMMANDS)} can be submitted")
    if any(word.split("=")[0] == "--workers" for word in command):
        raise InputError("submit: leave --workers out of the command: it runs on the workers of --to")


# ---- SLURM ------------------------------------------------------------------------------------------

_SCRIPT = """\
#!/usr/bin/env bash
{directives}

# Shortly before the walltime: the command stops cleanly and is queued again, to go on from the finished days.
stop_and_requeue() {{
    kill -TERM "$driver" 2> /dev/null
    wait "$driver"
    code=$?
    # From 128 on it was stopped by a signal; below that it had come to its end by itself.
    if (( code >= 128 )); then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}}
trap stop_and_requeue USR1

{prologue}{command} &
driver=$!
wait "$driver"
"""


def _slurm_script(place: SlurmPlace, file: Path, command: Sequence[str]) -> str:
    driver = place.driver
    options = {
        "job-name": "clusterlob",
        "partition": driver.queue or place.queue,
        "account": place.account,
        "ntasks": "1",
        "cpus-per-task": str(driver.cores),
        "mem": f"{math.ceil(driver.memory / 2**20)}M",
        "time": slurm_time(driver.walltime),
        "signal": f"B:USR1@{driver.stop_before // US_PER_SECOND}",
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "output": str(Path(place.log_directory) / "clusterlob-%j.log"),
    }
    directives = [f"#SBATCH --{name}={shlex.quote(text)}" for name, text in options.items() if text]
    words = [place.python, "-c", _MAIN, *command, "--workers", str(file.resolve())]
    return _SCRIPT.format(
        directives="\n".join([*directives, "#SBATCH --requeue"]),
        prologue="".join(f"{line}\n" for line in place.job_script_prologue),
        command=shlex.join(words),
    )


def _sbatch(script: str) -> str:
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise InputError("sbatch is not found: submit where SLURM jobs can be submitted") from None
    if done.returncode:
        raise InputError(f"SLURM refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


# ---- Kubernetes -------------------------------------------------------------------------------------


def _kubernetes_manifests(place: KubernetesPlace, file: Path, command: Sequence[str]) -> list[dict[str, Any]]:
    """A ConfigMap with the file of the place, and the Job that runs the command with it."""
    name = f"{place.name}-{uuid.uuid4().hex[:8]}"
    metadata = {"name": name, "namespace": place.namespace}
    words = ["python", "-c", _MAIN, *command, "--workers", f"{_PLACE_FOLDER}/place.yaml"]
    driver = {
        "name": "driver",
        "image": place.image,
        # Kubernetes would put variables in where it reads $(NAME).
        "command": [word.replace("$(", "$$(") for word in words],
        "env": [{"name": key, "value": value} for key, value in place.env.items()],
        **pod_access(place),
        **pod_resources(place.driver.cpu, place.driver.memory),
    }
    driver["volumeMounts"].append({"name": "place", "mountPath": _PLACE_FOLDER, "readOnly": True})
    pod = {
        "serviceAccountName": place.driver.service_account,
        "restartPolicy": "OnFailure",
        "containers": [driver],
        "volumes": [*pod_volumes(place), {"name": "place", "configMap": {"name": name}}],
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {"backoffLimit": place.driver.retries, "template": {"spec": pod}},
    }
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": dict(metadata),
        # JSON is YAML on one line.
        "data": {"place.yaml": json.dumps(read_yaml(file))},
    }
    return [settings, job]


def _apply(manifests: Sequence[Mapping[str, Any]]) -> str:
    """Create the resources, and return the name of the last one."""
    objects = import_extra("kr8s.objects", "cluster")
    try:
        for manifest in manifests:
            getattr(objects, manifest["kind"])(manifest).create()
    except Exception as error:
        raise ClusterlobError(f"Kubernetes did not take the job: {one_line(error)}") from error
    return str(manifests[-1]["metadata"]["name"])
