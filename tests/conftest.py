"""An S3-compatible store on this machine, for every test that asks for `s3`."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
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


@dataclass
class S3:
    """A bucket of its own for one test, and what was asked of the server."""

    bucket: str
    asked: list[str] = field(default_factory=list)
    """A line per request, as "GET /bucket/key"; a listing is "LIST /bucket prefix"."""

    def __truediv__(self, key: str) -> Location:
        return Location(f"s3://{self.bucket}/{key}")

    def upload(self, folder: Path, address: Location | str) -> Location:
        """Copy all files below a local folder to an address; returns it."""
        target = Location.of(address)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                (target / str(path.relative_to(folder))).put(path)
        return target


class _Server:
    """moto behind a list of what is asked of it."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.asked: list[str] = []
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.port}"

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        self.asked.append(_line(environ))
        return self._moto(environ, start)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _line(environ: dict[str, Any]) -> str:
    if "list-type" not in environ["QUERY_STRING"]:
        return f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
    return f"LIST {environ['PATH_INFO']} {environ['QUERY_STRING']}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[_Server]:
    server = _Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: _Server, monkeypatch: pytest.MonkeyPatch) -> S3:
    """An empty bucket; the environment points every client, also of child processes, to the server."""
    for name, value in _KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    pafs.S3FileSystem(endpoint_override=s3_server.endpoint, allow_bucket_creation=True).create_dir(bucket)
    s3_server.asked.clear()
    return S3(bucket, s3_server.asked)
