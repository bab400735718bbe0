"""Where tasks run: threads of this process, or Dask workers started from a place file.

A task is a plain function of one picklable argument that returns something small.  Results come back
in the order of the arguments, whatever the order in which they finish.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clusterlob_gpu.config import read_yaml
from clusterlob_gpu.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called with (stage, tasks done, tasks in all)."""


class Workers(Protocol):
    """Anything that maps a function over items."""

    name: str

    def map(self, stage: str, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of `function` over `items`, in order; the first error is raised."""
        ...


class Place(BaseModel):
    """A file of cluster_configs/: a place to run, not an experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["threads", "local"]
    n_workers: int = Field(default=2, ge=1)
    threads_per_worker: int = Field(default=1, ge=1)
    memory_limit: str = "auto"


def read_place(name: str | None) -> Place:
    """The place of `--workers`: a number of local workers, a name in cluster_configs/, or a file.

    None means threads of this process, one per core.  Raises ConfigError with the known names.
    """
    if name is None:
        return Place(kind="threads", n_workers=os.cpu_count() or 1)
    if name.isdigit() and int(name) > 0:
        return Place(kind="local", n_workers=int(name))
    path = Path(name) if name.endswith((".yaml", ".yml")) else _named_place(name)
    try:
        return Place(**read_yaml(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"{path}: {where} = {problem['input']!r}: {problem['msg']}") from None


def _named_place(name: str) -> Path:
    package = Path(str(resources.files("clusterlob_gpu")))
    folders = [Path("cluster_configs"), package / "cluster_configs", package.parent / "cluster_configs"]
    for folder in folders:
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(
        f"--workers {name}: no such place; there are {', '.join(known)}, or give a number or a file"
    )


@contextmanager
def open_workers(place: Place, progress: Progress) -> Iterator[Workers]:
    """The workers of a place, stopped at the end; Dask starts with the first tasks, after all checks."""
    if place.kind == "threads":
        with ThreadPoolExecutor(place.n_workers) as pool:
            yield _Threads(pool, place, progress)
        return
    with ExitStack() as running:
        yield _Dask(running, place, progress)


class _Threads:
    """Threads of this process; kernels and Parquet release the GIL."""

    def __init__(self, pool: ThreadPoolExecutor, place: Place, progress: Progress) -> None:
        self.pool, self.progress = pool, progress
        self.name = f"{place.n_workers} threads"

    def map(self, stage: str, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        self.progress(stage, 0, len(items))
        futures: list[Future[Result]] = [self.pool.submit(function, item) for item in items]
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                self.progress(stage, len(futures) - len(waiting), len(futures))
        finally:
            for future in waiting:
                future.cancel()
        return [future.result() for future in futures]


class _Dask:
    """Workers of a Dask cluster; only paths, records and centroids travel."""

    def __init__(self, running: ExitStack, place: Place, progress: Progress) -> None:
        self.running, self.place, self.progress = running, place, progress
        self.name = f"{place.n_workers} local workers x {place.threads_per_worker} threads"

    @cached_property
    def client(self) -> Any:
        """Client of the cluster, both started now and stopped with `running`."""
        import dask
        from distributed import Client, LocalCluster

        settings = {
            "distributed.admin.tick.limit": "1h",
            "distributed.worker.daemon": True,
        }
        self.running.enter_context(dask.config.set(settings))
        cluster = LocalCluster(
            n_workers=self.place.n_workers,
            threads_per_worker=self.place.threads_per_worker,
            memory_limit=self.place.memory_limit,
            processes=True,
            host="127.0.0.1",
            # Any free port: with None it is 8787, which a second run on the machine would find taken.
            dashboard_address="127.0.0.1:0",
        )
        return self.running.enter_context(Client(self.running.enter_context(cluster)))

    def map(self, stage: str, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        from distributed import as_completed

        self.progress(stage, 0, len(items))
        futures = self.client.map(function, items, pure=False, key=stage.replace(" ", "-"))
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                self.progress(stage, done, len(futures))
            return self.client.gather(futures)
        finally:
            self.client.cancel(futures, force=True)
