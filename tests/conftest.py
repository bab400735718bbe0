"""An S3-compatible store on this machine, for every test that asks for `s3`."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from clusterlob_gpu.files import Location

_KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server:
    """moto, with a list of what is asked of it, and a hook that spoils answers."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.asked: list[str] = []
        """A line per request: "GET /bucket/key", or "LIST /bucket prefix=..." for a listing."""
        self.spoil: Callable[[str], str | None] = lambda _: None
        """What to answer to such a line: an HTTP status, "cut" for half the content, None to do it well."""
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.port}"

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        if "list-type" in environ["QUERY_STRING"]:
            line = f"LIST {environ['PATH_INFO']} {environ['QUERY_STRING']}"
        self.asked.append(line)
        fault = self.spoil(line)
        if fault not in (None, "cut"):
            start(fault, [("Content-Length", "0"), ("Connection", "close")])
            return []
        answer = b"".join(self._moto(environ, start))
        return [answer[: len(answer) // 2] if fault else answer]

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@dataclass(frozen=True)
class S3:
    """A bucket of its own for one test."""

    server: Server
    bucket: str

    def __truediv__(self, key: str) -> Location:
        return Location(f"s3://{self.bucket}/{key}")

    def upload(self, folder: Path, address: Location | str) -> Location:
        """Copy all files below a local folder to an address; returns it."""
        target = Location.of(address)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                (target / str(path.relative_to(folder))).put(path)
        return target

    def asked(self) -> list[str]:
        """What was asked of the server since this was last called."""
        lines = list(self.server.asked)
        self.server.asked.clear()
        return lines


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty bucket; the environment points every client, also of child processes, to the server."""
    for name, value in _KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    pafs.S3FileSystem(endpoint_override=s3_server.endpoint, allow_bucket_creation=True).create_dir(bucket)
    yield S3(s3_server, bucket)
    s3_server.spoil = lambda _: None
