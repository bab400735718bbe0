"""Submissions: what is refused, and what a Kubernetes cluster is given.  SLURM's are in test_slurm."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterlob_gpu.errors import ClusterlobError, ConfigError, InputError
from clusterlob_gpu.places import read_place
from clusterlob_gpu.submit import render_submission, submit

COMMAND = ["run", "flow", "--lake", "/data/my lake", "--set", "note=$(HOME)"]

PLACE = """
kind: kubernetes
image: clusterlob-gpu:1
name: desk
namespace: research
env: {LAKE: /data}
secrets: [s3]
volumes: [{claim: lake, mount_path: /data}]
driver: {cpu: 1.5, memory: 4GiB, service_account: runner, retries: 2}
"""


@pytest.fixture
def pods(tmp_path: Path) -> str:
    file = tmp_path / "pods.yaml"
    file.write_text(PLACE)
    return str(file)


@pytest.mark.parametrize("to", ["local_cpu", "local_cuda", "connect", "3"])
def test_submit__only_to_queues(to: str) -> None:
    with pytest.raises(InputError, match=rf"^--to {to}: a place of kind \w+ has no queue"):
        submit(to, COMMAND)


def test_submit__unknown_place() -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such place; there are .*slurm_gpu"):
        submit("nowhere", COMMAND)


@pytest.mark.parametrize("command", [["info", "runs/btc"], ["ingest", "tardis"], []])
def test_submit__only_commands_with_workers(command: list[str]) -> None:
    given = " ".join(command) or "nothing"
    with pytest.raises(InputError, match=rf"^submit: {given}: only run, sweep, label can be submitted$"):
        submit("slurm_gpu", command)


@pytest.mark.parametrize("option", [["--workers", "4"], ["--workers=4"]])
def test_submit__workers_come_from_the_place(option: list[str]) -> None:
    with pytest.raises(InputError, match=r"^submit: leave --workers out of the command"):
        submit("slurm_gpu", [*COMMAND, *option])


def test_render_submission__job_of_kubernetes_has_its_place_with_it(pods: str) -> None:
    settings, job = yaml.safe_load_all(render_submission(pods, COMMAND))
    name = settings["metadata"]["name"]
    assert name.startswith("desk-")
    assert job["metadata"] == settings["metadata"] == {"name": name, "namespace": "research"}
    assert yaml.safe_load(settings["data"]["place.yaml"]) == yaml.safe_load(PLACE)
    assert job["spec"]["backoffLimit"] == 2
    pod = job["spec"]["template"]["spec"]
    assert (pod["serviceAccountName"], pod["restartPolicy"]) == ("runner", "OnFailure")
    driver = pod["containers"][0]
    main = "from clusterlob_gpu.cli import main; main()"
    assert driver["command"] == [
        *["python", "-c", main, "run", "flow", "--lake", "/data/my lake", "--set", "note=$$(HOME)"],
        *["--workers", "/etc/clusterlob/place.yaml"],
    ]
    assert driver["env"] == [{"name": "LAKE", "value": "/data"}]
    assert driver["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert driver["resources"]["limits"] == {"cpu": "1.5", "memory": str(4 * 2**30)}
    mounts = {mount["name"]: mount["mountPath"] for mount in driver["volumeMounts"]}
    assert mounts == {"volume-0": "/data", "place": "/etc/clusterlob"}
    assert [volume["name"] for volume in pod["volumes"]] == list(mounts)
    assert pod["volumes"][1]["configMap"] == {"name": name}


def test_render_submission__the_pods_place_is_the_submitters(pods: str, tmp_path: Path) -> None:
    settings, _ = yaml.safe_load_all(render_submission(pods, COMMAND))
    there = tmp_path / "there.yaml"
    there.write_text(settings["data"]["place.yaml"])
    assert read_place(str(there)) == read_place(pods)


# ---- handed in, to a server that speaks as much of Kubernetes as a client asks for ------------------


class _Api(BaseHTTPRequestHandler):
    posted: list[tuple[str, Any]]
    answer: int

    def do_GET(self) -> None:
        self.reply(
            200, {"gitVersion": "v1.31.0", "major": "1", "minor": "31", "versions": ["v1"], "groups": []}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.posted.append((self.path, body))
        refused = {"kind": "Status", "message": "jobs is forbidden", "code": self.answer}
        self.reply(self.answer, body if self.answer == 201 else refused)

    def reply(self, code: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def api_server(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: int) -> Iterator[list[tuple[str, Any]]]:
    """A server and the kubeconfig that names it; gives the (path, resource) of all that is created."""
    handler = type("Api", (_Api,), {"posted": [], "answer": answer})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {"token": "none"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield handler.posted
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_submit__creates_the_place_and_then_the_job(
    pods: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with api_server(tmp_path, monkeypatch, 201) as posted:
        name = submit(pods, COMMAND)
    assert [path for path, _ in posted] == [
        "/api/v1/namespaces/research/configmaps",
        "/apis/batch/v1/namespaces/research/jobs",
    ]
    assert {resource["metadata"]["name"] for _, resource in posted} == {name}


def test_submit__refused_by_kubernetes_is_one_line(
    pods: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        api_server(tmp_path, monkeypatch, 403),
        pytest.raises(ClusterlobError, match=r"^Kubernetes did not take the job: .*forbidden") as caught,
    ):
        submit(pods, COMMAND)
    assert "\n" not in str(caught.value)
