"""Where tasks run: threads of this process, or Dask workers of a place.

A task is a plain function of one picklable argument that returns something small.  Results come back
in the order of the arguments, whatever the order in which they finish, and whichever workers come and go.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from clusterlob_gpu import cores, heap
from clusterlob_gpu.config import format_duration
from clusterlob_gpu.errors import ClusterlobError, InputError, LakeError, TasksFailed, WorkerLostError
from clusterlob_gpu.places import (
    ConnectPlace,
    CudaPlace,
    DaskPlace,
    KubernetesPlace,
    LocalPlace,
    Place,
    SlurmPlace,
    ThreadsPlace,
    Tls,
    import_extra,
    kubernetes_manifest,
    one_line,
    read_place,
)
from clusterlob_gpu.schema import US_PER_SECOND
from clusterlob_gpu.versions import CODE_VERSION, COMPUTING, library_versions

__all__ = ["Place", "Progress", "Workers", "environment", "open_workers", "read_place"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called with (stage, tasks done, tasks in all)."""

Home = Callable[[Any], str | None]
"""Where an item is at home: what a worker holds of the tasks before, it holds for this name."""


def nowhere(_: Any) -> None:
    """Home of items that are as well off anywhere."""


_LIBRARIES = (*COMPUTING, "distributed")
"""Libraries whose version may change a value or how a task travels."""

_MOST_JOINED = 32
"""Items of a Dask task at most: as many are begun anew where a worker dies."""

_IDLE_S = 120
"""Seconds without work before a worker that is not needed is given back to the queue."""


class Workers(Protocol):
    """Anything that maps a function over items."""

    name: str
    progress: Progress

    def map(
        self,
        stage: str,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        home: Home = nowhere,
    ) -> list[Result]:
        """Results of `function` over `items`, in order; items of one `home` go to one worker if they can.

        An item that fails by its own fault (LakeError, MemoryError, a worker that dies of it) stops no
        other: all run to their end, then TasksFailed is raised.  Any other error is raised at once, and
        what waits is not begun.
        """
        ...

    def kmeans(
        self, rows: Callable[[Item], Any], items: Sequence[Item], centroids: np.ndarray, most_passes: int
    ) -> np.ndarray:
        """Centres (k, 6) that cuML finds from given ones over the device arrays that `rows` makes of items.

        Raises InputError where there are no Dask workers with GPUs.
        """
        ...


@contextmanager
def open_workers(place: Place, progress: Progress) -> Iterator[Workers]:
    """The workers of a place, stopped at the end; Dask starts with the first tasks, after all checks."""
    if isinstance(place, ThreadsPlace):
        with cores.shared(place.n_workers), ThreadPoolExecutor(place.n_workers) as pool:
            yield _Threads(pool, place, progress)
        return
    assert isinstance(place, DaskPlace)
    with ExitStack() as running:
        yield _Dask(running, place, progress)


# ---- outcomes of tasks ------------------------------------------------------------------------------


_OWN_FAULTS = (LakeError, WorkerLostError, MemoryError)
"""Errors of a task that are its item's own fault."""


class _Outcomes(Generic[Result]):
    """What the tasks of one stage gave: results, and errors that are an item's own fault."""

    def __init__(self, stage: str, n_items: int) -> None:
        self.stage, self.n_items = stage, n_items
        self.results: dict[int, Result] = {}
        self.failed: dict[int, Exception] = {}

    def add(self, index: int, result: Callable[[], Result]) -> None:
        """Keep the result of an item, or its error; raises an error that concerns all items."""
        try:
            self.results[index] = result()
            self.failed.pop(index, None)
        except MemoryError as error:
            self.failed[index] = WorkerLostError(
                f"{self.stage}: a task found no memory ({error or 'none left'}); "
                "give its worker more memory or fewer threads"
            )
        except (LakeError, WorkerLostError) as error:
            self.failed[index] = error

    def without_lost(self, items: Sequence[int]) -> list[int]:
        """Those of the items that were lost, now without an outcome."""
        lost = [index for index in items if isinstance(self.failed.get(index), WorkerLostError)]
        for index in lost:
            del self.failed[index]
        return lost

    @property
    def done(self) -> int:
        return len(self.results) + len(self.failed)

    def in_order(self) -> list[Result]:
        """All results; raises TasksFailed if some item has none."""
        if self.failed:
            raise TasksFailed(self.stage, self.failed)
        return [self.results[index] for index in range(self.n_items)]


class _Threads:
    """Threads of this process; kernels and Parquet release the GIL."""

    def __init__(self, pool: ThreadPoolExecutor, place: ThreadsPlace, progress: Progress) -> None:
        self.pool, self.progress = pool, progress
        self.name = place.describe()

    def map(
        self,
        stage: str,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        home: Home = nowhere,  # noqa: ARG002 - all threads share their memory
    ) -> list[Result]:
        self.progress(stage, 0, len(items))
        outcomes = _Outcomes[Result](stage, len(items))
        index: dict[Future[Result], int] = {
            self.pool.submit(cores.taking_one(function), item): i for i, item in enumerate(items)
        }
        waiting = set(index)
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    outcomes.add(index[future], future.result)
                self.progress(stage, outcomes.done, len(items))
        finally:
            for future in waiting:
                future.cancel()
        return outcomes.in_order()

    def kmeans(
        self,
        rows: Callable[[Item], Any],  # noqa: ARG002
        items: Sequence[Item],  # noqa: ARG002
        centroids: np.ndarray,  # noqa: ARG002
        most_passes: int,  # noqa: ARG002
    ) -> np.ndarray:
        raise InputError("engine = 'cuml_dask': needs Dask workers with GPUs, such as --workers local_cuda")


# ---- Dask -------------------------------------------------------------------------------------------


def joined(items: Sequence[Item], at_once: int, most: int = _MOST_JOINED) -> list[list[Item]]:
    """Items as they go to the workers, up to `most` in a task: many at first, one by one at last.

    The scheduler takes milliseconds for a task, however short.  A task has half of what is left for each of
    `at_once` at most (guided self-scheduling: Polychronopoulos, Kuck 1987, IEEE ToC 36, 1425-1439).  Items
    are dealt out like cards: those that follow each other, such as the days of the largest symbol, are apart.
    """
    sizes, left = list[int](), len(items)
    while left:
        sizes.append(max(1, min(most, left // (2 * at_once))))
        left -= sizes[-1]
    parts: list[list[Item]] = [[] for _ in sizes]
    at = 0
    for turn in range(max(sizes, default=0)):
        for part, size in zip(parts, sizes, strict=True):
            if turn >= size:
                break  # sizes only fall
            part.append(items[at])
            at += 1
    return parts


class _Dask:
    """Workers of a Dask scheduler; only paths, records and centroids travel."""

    def __init__(self, running: ExitStack, place: DaskPlace, progress: Progress) -> None:
        self.running, self.place, self.progress = running, place, progress
        self.name = place.describe()
        self._homes: dict[str, str] = {}
        """Address of the worker that has last worked for a home."""

    @cached_property
    def client(self) -> Any:
        """Client of workers that run the same code, all started now and stopped with `running`."""
        import dask
        import distributed  # noqa: F401 - its own settings come first, or those below would take them along

        settings = {
            "distributed.admin.tick.limit": "1h",
            # A year of fifty symbols are 100 MB of tasks, which is no news to their user.
            "distributed.admin.large-graph-warning-threshold": "1GB",
            "distributed.worker.daemon": True,
            "distributed.scheduler.allowed-failures": self.place.allowed_failures,
            # A worker holds no more tasks than it runs: one that dies takes no waiting task down with it.
            "distributed.scheduler.worker-saturation": 1.0,
            # Local workers keep their memory as a command does.
            **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in heap.AT_START.items()},
            # The client does not set CUDF_SPILL, since it computes nothing.
            "cudf-spill-warning": False,
        }
        self.running.enter_context(dask.config.set(settings))
        # What it has to say of a lost scheduler is said in one line by `_scheduler_watched`.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        client = _start(self.running, self.place)
        with self._scheduler_watched(client):
            _wait_for_a_worker(client, self.place)
            _check_workers(client)
        return client

    def map(
        self,
        stage: str,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        home: Home = nowhere,
    ) -> list[Result]:
        self.progress(stage, 0, len(items))
        if not items:
            return []
        outcomes = _Outcomes[Result](stage, len(items))
        with self._scheduler_watched(self.client):
            lost = self._compute(outcomes, function, dict(enumerate(items)), home)
            # Items that share a task or a worker share its end: alone, only who is at fault fails.
            lost = self._compute(outcomes, function, {at: items[at] for at in lost}, home, most=1)
            for at in lost:
                self._compute(outcomes, function, {at: items[at]}, home)
        return outcomes.in_order()

    def _compute(
        self,
        outcomes: _Outcomes[Result],
        function: Callable[[Item], Result],
        items: Mapping[int, Item],
        home: Home,
        most: int = _MOST_JOINED,
    ) -> list[int]:
        """Add the outcomes of some items of a stage, given by their index, `most` to a task.

        Gives those lost in company, which then are still without an outcome.
        """
        from distributed import as_completed

        client, stage, lost = self.client, outcomes.stage, list[int]()
        waiting = self._submitted(stage, function, items, home, most)
        try:
            for future in as_completed(waiting, loop=client.loop):
                part = waiting.pop(future)
                given = self._answers(stage, future, [home(items[index]) for index in part])
                for index, one in zip(part, given, strict=True):
                    outcomes.add(index, one)
                if len(part) > 1 or (self.place.threads_per_worker > 1 and len(items) > 1):
                    lost += outcomes.without_lost(part)
                # What has been fetched is let go, or Dask would compute it again for a lost worker.
                future.release()
                self.progress(stage, outcomes.done, outcomes.n_items)
        finally:
            if client.status == "running":
                client.cancel(list(waiting), force=True)
        return lost

    def _submitted(
        self, stage: str, function: Callable[[Item], Any], items: Mapping[int, Item], home: Home, most: int
    ) -> dict[Any, list[int]]:
        """Futures of joined items, by their indices; those whose home has a worker are sent there if it is
        still alive."""
        task, groups = _Task(function, environment()), dict[str | None, list[int]]()
        for index, item in items.items():
            groups.setdefault(self._homes.get(home(item) or ""), []).append(index)
        waiting: dict[Any, list[int]] = {}
        for address, group in groups.items():
            where = {} if address is None else {"workers": [address], "allow_other_workers": True}
            at_once = self._at_once if address is None else self.place.threads_per_worker
            parts = joined(group, at_once, most)
            held = [[items[index] for index in part] for part in parts]
            futures = self.client.map(task, held, pure=False, key=stage.replace(" ", "-"), **where)
            waiting |= zip(futures, parts, strict=True)
        return waiting

    @property
    def _at_once(self) -> int:
        """Tasks that run at once where all workers have come that may."""
        if self.place.workers is not None:
            return self.place.workers[1] * self.place.threads_per_worker
        return max(1, sum(self.client.nthreads().values()))

    def _answers(self, stage: str, future: Any, homes: Sequence[str | None]) -> Sequence[Callable[[], Any]]:
        """What a finished task gave for each of its items, to be called; WorkerLostError for each where the
        task took all its workers down."""
        from distributed.scheduler import KilledWorker

        try:
            worker, given = future.result()
        except KilledWorker as error:
            lost = WorkerLostError(
                f"{stage}: the worker of a task died {error.allowed_failures + 1} times; "
                "its memory limit may be too small"
            )
            return [_Fault(lost)] * len(homes)
        self._homes |= {home: worker for home in homes if home is not None}
        return given

    def kmeans(
        self, rows: Callable[[Item], Any], items: Sequence[Item], centroids: np.ndarray, most_passes: int
    ) -> np.ndarray:
        cluster = import_extra("cuml.dask.cluster", "gpu-cu13")
        from dask import array
        from dask.delayed import delayed

        task = _Task(rows, environment())
        with self._scheduler_watched(self.client):
            parts = self.client.map(task.alone, items, pure=False)
            lengths = self.client.gather(self.client.compute([delayed(len)(part) for part in parts]))
            blocks = [
                array.from_delayed(part, (length, centroids.shape[1]), np.float32)
                for part, length in zip(parts, lengths, strict=True)
            ]
            model = cluster.KMeans(
                client=self.client,
                n_clusters=len(centroids),
                init=centroids.astype(np.float32),
                n_init=1,
                max_iter=most_passes,
                tol=1e-6,
            )
            model.fit(array.concatenate(blocks))
        centres = model.cluster_centers_
        found: np.ndarray = centres.get() if hasattr(centres, "get") else np.asarray(centres)
        return found.astype(np.float64)

    @contextmanager
    def _scheduler_watched(self, client: Any) -> Iterator[None]:
        """Turns what Dask raises when its scheduler is gone into one line."""
        from distributed import CancelledError

        address = client.scheduler.address
        try:
            yield
        except (CancelledError, OSError) as error:
            # An OSError of a task, such as a full disk, comes with a scheduler that still answers.
            if isinstance(error, OSError) and client.status == "running":
                raise
            raise ClusterlobError(
                f"the Dask scheduler at {address} was lost; finished days are kept: "
                "give the same command again"
            ) from None


def _start(running: ExitStack, place: DaskPlace) -> Any:
    """Client of the place's scheduler; both are closed with `running`."""
    from distributed import Client

    seconds = place.start_timeout / US_PER_SECOND
    try:
        if isinstance(place, ConnectPlace):
            security = _security(place.tls)
            return running.enter_context(Client(place.address, timeout=seconds, security=security))
        return running.enter_context(Client(_START[type(place)](running, place)))
    except ClusterlobError:
        raise
    except Exception as error:
        raise ClusterlobError(f"{place.describe()}: cannot start: {one_line(error)}") from error


def _start_local(running: ExitStack, place: LocalPlace) -> Any:
    from distributed import LocalCluster

    cluster = LocalCluster(
        n_workers=place.n_workers,
        threads_per_worker=place.threads_per_worker,
        memory_limit=place.memory_per_worker,
        processes=True,
        host="127.0.0.1",
        # Any free port: with None it is 8787, which a second run on the machine would find taken.
        dashboard_address="127.0.0.1:0",
    )
    return running.enter_context(cluster)


def _start_cuda(running: ExitStack, place: CudaPlace) -> Any:
    dask_cuda = import_extra("dask_cuda", "gpu-cu13")
    cluster = dask_cuda.LocalCUDACluster(**place.options(), host="127.0.0.1", dashboard_address="127.0.0.1:0")
    return running.enter_context(cluster)


def _start_slurm(running: ExitStack, place: SlurmPlace) -> Any:
    dask_jobqueue = import_extra("dask_jobqueue", "cluster")
    cluster = running.enter_context(dask_jobqueue.SLURMCluster(**place.options()))
    _test_job(cluster.job_script())
    if place.processes > 1:
        _forget_ended_jobs(cluster)
    # Adaptive even where the number is fixed: this is what replaces jobs that end.
    cluster.adapt(minimum_jobs=place.min_jobs, maximum_jobs=place.max_jobs, wait_count=_IDLE_S)
    return cluster


def _forget_ended_jobs(cluster: Any) -> None:
    """Let a job be replaced once all its workers are gone, as Dask itself does for jobs of one worker."""
    import dask
    from dask.utils import parse_timedelta
    from distributed import SchedulerPlugin

    # A worker that is merely restarted comes back within this time.
    delay_s = parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout"))
    arrived: set[str] = set()

    def present() -> set[str]:
        """Jobs of the connected workers: these are named JOB-0, JOB-1, ..."""
        return {str(worker.name).rpartition("-")[0] for worker in cluster.scheduler.workers.values()}

    def forget() -> None:
        for job in arrived - present():
            arrived.discard(job)
            cluster.workers.pop(job, None)

    class ForgetEndedJobs(SchedulerPlugin):
        def add_worker(self, *_: Any, **__: Any) -> None:
            arrived.update(present())

        def remove_worker(self, *_: Any, **__: Any) -> None:
            asyncio.get_running_loop().call_later(delay_s, forget)

    cluster.scheduler.add_plugin(ForgetEndedJobs())


def _test_job(script: str) -> None:
    """Raise InputError if SLURM would not take the job; dask-jobqueue tells only its log."""
    try:
        sbatch = ["sbatch", "--test-only"]
        done = subprocess.run(sbatch, input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(
            "sbatch is not found: start this on a node where SLURM jobs can be submitted"
        ) from None
    if done.returncode:
        raise InputError(f"SLURM refuses the workers' job: {' '.join(done.stderr.split())}")


def _start_kubernetes(running: ExitStack, place: KubernetesPlace) -> Any:
    operator = import_extra("dask_kubernetes.operator", "cluster")
    # Asked first: a KubeCluster that cannot start complains once more at the end of the process.
    import_extra("kr8s", "cluster").api(namespace=place.namespace).version()
    cluster = operator.KubeCluster(
        custom_cluster_spec=kubernetes_manifest(place, f"{place.name}-{uuid.uuid4().hex[:8]}"),
        namespace=place.namespace,
        resource_timeout=place.start_timeout // US_PER_SECOND,
        shutdown_on_close=True,
        quiet=True,
    )
    running.enter_context(cluster)
    least, most = place.workers
    if least < most:
        cluster.adapt(minimum=least, maximum=most)
    return cluster


_START: dict[type[DaskPlace], Callable[[ExitStack, Any], Any]] = {
    LocalPlace: _start_local,
    CudaPlace: _start_cuda,
    SlurmPlace: _start_slurm,
    KubernetesPlace: _start_kubernetes,
}


def _security(tls: Tls | None) -> Any:
    """Dask's Security of a TLS scheduler; raises InputError naming a file that is missing."""
    from distributed.security import Security

    if tls is None:
        return None
    for path in (tls.ca_file, tls.cert, tls.key):
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; tls needs the PEM files ca_file, cert and key")
    return Security(
        tls_ca_file=tls.ca_file, tls_client_cert=tls.cert, tls_client_key=tls.key, require_encryption=True
    )


def _wait_for_a_worker(client: Any, place: DaskPlace) -> None:
    """Raise ClusterlobError if none comes in time.

    It waits for a task rather than for a worker: adaptive places start the first one only for a task.
    """
    try:
        client.submit(len, (), pure=False).result(timeout=place.start_timeout / US_PER_SECOND)
    except TimeoutError:
        waited = format_duration(place.start_timeout)
        raise ClusterlobError(
            f"{place.describe()}: none came within {waited}; look at {place.where_to_look}"
        ) from None


# ---- the same code everywhere -----------------------------------------------------------------------


@cache
def environment() -> dict[str, str]:
    """What may change a value besides the config: the source of this package, and versions."""
    versions = library_versions()
    held = {"clusterlob_gpu": CODE_VERSION, "python": versions["python"].rpartition(".")[0]}
    return held | {library: versions[library] for library in _LIBRARIES}


def _check_workers(client: Any) -> None:
    """Raise InputError if a worker or the scheduler runs other code than this process."""
    found: dict[str, Any] = {
        f"worker {address}": there for address, there in client.run(environment, on_error="return").items()
    }
    try:
        found["the scheduler"] = client.run_on_scheduler(environment)
    except ImportError as error:
        found["the scheduler"] = error
    for who, there in found.items():
        if isinstance(there, BaseException):
            raise InputError(
                f"{who} cannot say what it runs ({one_line(there)}): install the same clusterlob_gpu there"
            )
        _require_same(who, environment(), there)


def _require_same(who: str, here: Mapping[str, str], there: Mapping[str, str]) -> None:
    other = [
        f"{name} {there.get(name)} instead of {value}"
        for name, value in here.items()
        if there.get(name) != value
    ]
    if other:
        raise InputError(f"{who} has {', '.join(other)}: results could depend on the worker")


@dataclass(frozen=True)
class _Task(Generic[Item, Result]):
    """A function that first makes sure of its worker: one that joins late has not been checked before."""

    function: Callable[[Item], Result]
    environment: Mapping[str, str]

    def __call__(self, items: Sequence[Item]) -> tuple[str, list[Callable[[], Result]]]:
        """Address of the worker, and what the function gives for each item, as `_Outcomes.add` takes it.

        An error that is not the item's own fault is raised at once.
        """
        address = self._checked()
        return address, [self._given(item) for item in items]

    def alone(self, item: Item) -> Result:
        """What the function gives for one item, to stay with the worker."""
        self._checked()
        return self.function(item)

    def _checked(self) -> str:
        from distributed import get_worker

        address: str = get_worker().address
        if self.environment != environment():
            _require_same(f"worker {address}", self.environment, environment())
        return address

    def _given(self, item: Item) -> Callable[[], Result]:
        try:
            return _Result(self.function(item))
        except _OWN_FAULTS as error:
            # With its traceback it would hold the arrays of a whole day while the next items are computed.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            return _Fault(error)


@dataclass(frozen=True)
class _Result(Generic[Result]):
    """Gives a result when it is called."""

    value: Result

    def __call__(self) -> Result:
        return self.value


@dataclass(frozen=True)
class _Fault:
    """Raises an error when it is called."""

    error: Exception

    def __call__(self) -> Any:
        raise self.error
