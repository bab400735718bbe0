"""Places to run: what `--workers` and a file of cluster_configs/ may say.

A place is not an experiment: it changes when and where a number is computed, never its value.  Each kind
has one model, told apart by `kind`; `workers` starts what a model describes.  Sizes are written `16GB` or
`16GiB` and held in bytes, durations are written `90s`, `10m` or `2h` and held in microseconds.
"""

from __future__ import annotations

import importlib
import math
import shlex
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError, model_validator

from clusterlob_gpu import cores, heap
from clusterlob_gpu.config import Duration, parse_duration, read_yaml
from clusterlob_gpu.errors import ConfigError, InputError
from clusterlob_gpu.schema import US_PER_SECOND

GIB = 2**30
_MINUTE = parse_duration("1m")

Count = Annotated[int, Field(ge=1)]
AutoSize = Annotated[ByteSize | None, BeforeValidator(lambda value: None if value == "auto" else value)]
"""Bytes; None (written `auto`) is the machine's memory, shared evenly by its workers."""
DeviceSize = float | str | None
"""Part of a GPU's memory as a fraction (0.9), or a size (`30GB`); None leaves it to dask-cuda."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Place(_Model):
    """A place to run.  `Place(kind="local", ...)` makes the model of that kind.

    `workers` is the (least, most) number of workers, None where only the place itself knows;
    `threads_per_worker` the tasks that a worker runs at once; `memory_per_worker` bytes, None if unknown.
    """

    kind: Literal["threads", "local", "cuda", "slurm", "kubernetes", "connect"]

    def __new__(cls, **fields: Any) -> Any:
        """The model of `kind`; an unknown kind stays a Place, whose validation then names it."""
        kind = str(fields.get("kind"))
        return super().__new__(_KINDS.get(kind, cls) if cls is Place else cls)

    @property
    def workers(self) -> tuple[int, int] | None:
        return None

    @property
    def memory_per_worker(self) -> int | None:
        return None

    @property
    def gpus_there(self) -> bool | None:
        """Whether the workers have a GPU each; None where they have what this machine has."""
        return None

    def memory_for(self, base: int, task: int) -> int:
        """Bytes of a worker that takes `base` by itself and `task` for each task that it runs at once."""
        return base + task * int(getattr(self, "threads_per_worker", 1))

    def describe(self) -> str:
        """One line for people: how many workers of what."""
        raise NotImplementedError


class ThreadsPlace(Place):
    """Threads of this process."""

    kind: Literal["threads"] = "threads"
    n_workers: Count = 2
    """Threads."""

    @property
    def workers(self) -> tuple[int, int]:
        return 1, 1

    @property
    def threads_per_worker(self) -> int:
        return self.n_workers

    @property
    def memory_per_worker(self) -> int:
        return machine_memory()

    def describe(self) -> str:
        return f"{self.n_workers} threads"


class DaskPlace(Place):
    """What all places with Dask workers have."""

    threads_per_worker: Count = 1
    """Tasks that a worker runs at once."""
    allowed_failures: int = Field(default=3, ge=0)
    """How often a task may take its worker down before it is given up."""
    start_timeout: Duration = _MINUTE
    """How long to wait for the first worker."""

    where_to_look: ClassVar[str] = "the workers' output"


class LocalPlace(DaskPlace):
    """Dask workers on this machine, one process each."""

    kind: Literal["local"] = "local"
    n_workers: Count = 2
    memory_limit: AutoSize = None
    """Bytes of a worker; one that needs more is restarted.  `auto`: machine memory / n_workers."""

    @property
    def workers(self) -> tuple[int, int]:
        return self.n_workers, self.n_workers

    @property
    def memory_per_worker(self) -> int:
        return self.memory_limit or machine_memory() // self.n_workers

    def describe(self) -> str:
        return f"{self.n_workers} local workers x {self.threads_per_worker} threads"


class _Gpus(_Model):
    """How a worker uses its GPU; the names are dask-cuda's."""

    rmm_pool_size: DeviceSize = 0.9
    """Memory that a worker takes from its GPU at the start and shares out itself."""
    enable_cudf_spill: bool = True
    """cuDF moves what does not fit the device to the host's memory."""
    device_memory_limit: DeviceSize = None
    """Where Dask begins to spill what it keeps on the device; tasks here leave nothing there."""

    def device_options(self) -> dict[str, Any]:
        """Keywords of LocalCUDACluster; what is None is left out."""
        options = {name: getattr(self, name) for name in _Gpus.model_fields}
        return {name: value for name, value in options.items() if value is not None}

    def device_flags(self) -> list[str]:
        """The same as options of `dask cuda worker`."""
        options = self.device_options()
        spill = options.pop("enable_cudf_spill")
        flags = ["--enable-cudf-spill" if spill else "--disable-cudf-spill"]
        for name, value in options.items():
            flags += [f"--{name.replace('_', '-')}", str(value)]
        return flags


class CudaPlace(_Gpus, DaskPlace):
    """GPUs of this machine: a worker each."""

    kind: Literal["cuda"] = "cuda"
    n_workers: Count | None = None
    """GPUs to use; null: all that CUDA_VISIBLE_DEVICES shows."""
    memory_limit: AutoSize = None
    """Bytes of host memory of a worker; `auto`: an even share."""
    local_directory: str | None = None
    """Folder of a fast disk, for what a worker spills."""
    protocol: Literal["tcp", "ucx"] = "tcp"

    @property
    def workers(self) -> tuple[int, int] | None:
        return None if self.n_workers is None else (self.n_workers, self.n_workers)

    @property
    def memory_per_worker(self) -> int | None:
        if self.memory_limit or self.n_workers is None:
            return self.memory_limit
        return machine_memory() // self.n_workers

    @property
    def gpus_there(self) -> bool:
        return True

    def describe(self) -> str:
        return f"{self.n_workers or 'all'} local GPUs x {self.threads_per_worker} threads"

    def options(self) -> dict[str, Any]:
        """Keywords of dask_cuda.LocalCUDACluster."""
        return {
            "n_workers": self.n_workers,
            "threads_per_worker": self.threads_per_worker,
            "memory_limit": self.memory_limit or "auto",
            "local_directory": self.local_directory,
            "protocol": self.protocol,
            **self.device_options(),
        }


class SlurmDriver(_Model):
    """The job of `clusterlob submit`: the command itself, which starts the workers' jobs."""

    cores: Count = 2
    memory: ByteSize = ByteSize(8 * GIB)
    """Bytes of the job."""
    walltime: Duration = parse_duration("1d")
    """At its end the command stops cleanly and the job is queued anew."""
    stop_before: Duration = 2 * _MINUTE
    """How long before the end of the walltime the command is told to stop; SLURM counts whole seconds."""
    queue: str | None = None
    """Partition; null: the one of the workers."""


class SlurmPlace(_Gpus, DaskPlace):
    """Jobs of a SLURM queue, each with one or several workers; one that ends or is lost is replaced."""

    kind: Literal["slurm"] = "slurm"
    worker_command: Literal["dask_cuda.cli", "distributed.cli.dask_worker"] = "dask_cuda.cli"
    """Module that a job runs: the first for GPUs, the second for CPUs."""
    min_jobs: int = Field(default=1, ge=0)
    max_jobs: Count = 1
    """Jobs are asked for as there is work, between the two."""
    processes: Count = 1
    """Workers of a job; with GPUs one for each."""
    gpus: int = Field(default=1, ge=0)
    """GPUs of a job (`--gres=gpu:N`)."""
    cores: Count = 4
    """CPU cores of a job."""
    memory: ByteSize = ByteSize(32 * GIB)
    """Bytes of host memory of a job; its workers share it evenly."""
    walltime: Duration = parse_duration("2h")
    lifetime_margin: Duration = 5 * _MINUTE
    """How long before the walltime a worker stops taking tasks and ends, so that none is cut."""
    queue: str | None = None
    """Partition."""
    account: str | None = None
    interface: str | None = None
    """Network interface of the driver and the workers, such as ib0."""
    local_directory: str | None = None
    """Folder of a fast disk on the nodes."""
    log_directory: str = "logs/slurm"
    """Folder of the jobs' output, made when missing."""
    job_extra_directives: tuple[str, ...] = ()
    """Further `#SBATCH` lines, such as `--constraint=h100`."""
    job_script_prologue: tuple[str, ...] = ()
    """Shell lines before the worker, such as `module load cuda`."""
    python: str = sys.executable
    """Python of the jobs; it must have the same packages as the driver's."""
    protocol: Literal["tcp", "ucx"] | None = None
    driver: SlurmDriver = SlurmDriver()
    start_timeout: Duration = 10 * _MINUTE

    where_to_look: ClassVar[str] = "`squeue --me` and the logs of the jobs"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_jobs > self.max_jobs:
            raise ValueError(f"min_jobs = {self.min_jobs}: must not be above max_jobs = {self.max_jobs}")
        if self.lifetime_margin >= self.walltime:
            raise ValueError("lifetime_margin: must be below walltime, or a worker has no time to work")
        if self.worker_command == "dask_cuda.cli" and self.processes != self.gpus:
            raise ValueError(
                f"processes = {self.processes}: dask_cuda.cli has one for each of {self.gpus} gpus"
            )
        return self

    @property
    def workers(self) -> tuple[int, int]:
        return self.min_jobs * self.processes, self.max_jobs * self.processes

    @property
    def memory_per_worker(self) -> int:
        return self.memory // self.processes

    @property
    def gpus_there(self) -> bool:
        return self.worker_command == "dask_cuda.cli"

    def describe(self) -> str:
        jobs = f"{self.max_jobs}" if self.min_jobs == self.max_jobs else f"{self.min_jobs} to {self.max_jobs}"
        return f"{jobs} SLURM jobs x {self.processes} workers x {self.threads_per_worker} threads"

    def options(self) -> dict[str, Any]:
        """Keywords of dask_jobqueue.SLURMCluster."""
        extra = list(self.job_extra_directives)
        # sbatch takes only one of --mem, --mem-per-cpu and --mem-per-gpu.
        own_memory = any(directive.startswith("--mem") for directive in extra)
        memory = [f"export {name}={value}" for name, value in heap.AT_START.items()]
        # Told to all kinds of workers through the environment: `dask cuda worker` has no --lifetime.
        lifetime = [
            f"export DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION={self._lifetime_s}s",
            f"export DASK_DISTRIBUTED__WORKER__LIFETIME__STAGGER={self._stagger_s}s",
        ]
        return {
            # jobqueue divides both by the processes: these are tasks at once, not cores to book.
            "cores": self.threads_per_worker * self.processes,
            "memory": f"{int(self.memory)}B",
            "job_cpu": self.cores,
            "processes": self.processes,
            "queue": self.queue,
            "account": self.account,
            "walltime": slurm_time(self.walltime),
            "job_name": "clusterlob-worker",
            "worker_command": self.worker_command,
            "worker_extra_args": self.device_flags() if self.worker_command == "dask_cuda.cli" else [],
            "job_extra_directives": [*([f"--gres=gpu:{self.gpus}"] if self.gpus else []), *extra],
            "job_directives_skip": ["--mem="] if own_memory else [],
            "job_script_prologue": [*memory, *self.job_script_prologue, *lifetime],
            "python": shlex.quote(self.python),
            "interface": self.interface,
            "local_directory": self.local_directory,
            "log_directory": self.log_directory,
            "protocol": self.protocol,
            # Any free port: two runs may share a login node.
            "scheduler_options": {"dashboard_address": ":0"},
        }

    @property
    def _lifetime_s(self) -> int:
        return (self.walltime - self.lifetime_margin) // US_PER_SECOND

    @property
    def _stagger_s(self) -> int:
        """Workers that began together do not end together; the draw stays inside the margin."""
        return min(self._lifetime_s, self.lifetime_margin // US_PER_SECOND) // 4


class Volume(_Model):
    """A claim that every worker and the driver mount: the lake, the store, the runs."""

    claim: str
    """Name of a PersistentVolumeClaim of the namespace."""
    mount_path: str
    read_only: bool = False


class KubernetesDriver(_Model):
    """The Job of `clusterlob submit`: the command itself, which starts the workers' pods."""

    cpu: float = 2
    memory: ByteSize = ByteSize(8 * GIB)
    service_account: str = "clusterlob"
    """Account that may make DaskClusters in the namespace."""
    retries: int = Field(default=3, ge=0)
    """How often a driver that failed is started again; a lost pod always is."""


class KubernetesPlace(_Gpus, DaskPlace):
    """Pods that the Dask operator of a Kubernetes cluster starts."""

    kind: Literal["kubernetes"] = "kubernetes"
    image: str
    """Container image with this package, of the driver's version."""
    name: str = Field(default="clusterlob", pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$")
    """Begin of the names of what is made; each run adds its own ending."""
    namespace: str = "default"
    worker_command: Literal["dask cuda worker", "dask worker"] = "dask cuda worker"
    n_workers: Count = 1
    max_workers: Count | None = None
    """With it the number follows the work, from n_workers to max_workers."""
    cpu: float = 4
    """CPU cores of a worker."""
    memory: ByteSize = ByteSize(32 * GIB)
    """Bytes of host memory of a worker."""
    gpus: int = Field(default=1, ge=0, le=1)
    """GPUs of a worker."""
    scheduler_memory: ByteSize = ByteSize(4 * GIB)
    idle_timeout: Duration = parse_duration("1h")
    """Pods whose driver was lost are deleted after this time without work."""
    env: dict[str, str] = {}
    """Environment variables of workers, scheduler and driver; secrets belong in `secrets`."""
    secrets: tuple[str, ...] = ()
    """Secrets of the namespace whose keys become environment variables of workers and driver."""
    volumes: tuple[Volume, ...] = ()
    driver: KubernetesDriver = KubernetesDriver()
    start_timeout: Duration = 10 * _MINUTE

    where_to_look: ClassVar[str] = "`kubectl get pods` and `kubectl describe pod`"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_workers is not None and self.max_workers < self.n_workers:
            raise ValueError(f"max_workers = {self.max_workers}: is below n_workers = {self.n_workers}")
        if self.worker_command == "dask cuda worker" and self.gpus != 1:
            raise ValueError(f"gpus = {self.gpus}: `dask cuda worker` needs one")
        return self

    @property
    def workers(self) -> tuple[int, int]:
        return self.n_workers, self.max_workers or self.n_workers

    @property
    def memory_per_worker(self) -> int:
        return self.memory

    @property
    def gpus_there(self) -> bool:
        return self.worker_command == "dask cuda worker"

    def describe(self) -> str:
        least, most = self.workers
        pods = f"{most}" if least == most else f"{least} to {most}"
        return f"{pods} Kubernetes workers x {self.threads_per_worker} threads"

    def worker_args(self) -> list[str]:
        """The command of a worker, without its name."""
        flags = ["--nthreads", str(self.threads_per_worker), "--memory-limit", str(int(self.memory))]
        cuda = self.worker_command == "dask cuda worker"
        return [*self.worker_command.split(), *flags, *(self.device_flags() if cuda else [])]


class Tls(_Model):
    """Certificates of a scheduler that speaks TLS: PEM files."""

    ca_file: str
    cert: str
    key: str


class ConnectPlace(DaskPlace):
    """A Dask scheduler that runs already, with its own workers.  `allowed_failures` is its own."""

    kind: Literal["connect"] = "connect"
    address: str
    """Such as tcp://10.0.0.5:8786 or tls://..."""
    tls: Tls | None = None

    where_to_look: ClassVar[str] = "whether workers are connected to the scheduler"

    @property
    def gpus_there(self) -> bool:
        return False  # as far as anyone knows: --backend gpu says otherwise

    def describe(self) -> str:
        return f"workers of {self.address}"


_KINDS: dict[str, type[Place]] = {
    "threads": ThreadsPlace,
    "local": LocalPlace,
    "cuda": CudaPlace,
    "slurm": SlurmPlace,
    "kubernetes": KubernetesPlace,
    "connect": ConnectPlace,
}


def read_place(name: str | None) -> Place:
    """The place of `--workers`: a number of local workers, a name in cluster_configs/, or a file.

    None means threads of this process, one per core.  Raises ConfigError with the known names.
    """
    if name is None:
        return ThreadsPlace(n_workers=cores.available())
    if name.isdigit() and int(name) > 0:
        return LocalPlace(n_workers=int(name))
    path = place_file(name)
    values = read_yaml(path)
    try:
        return Place(**values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where} = {problem['input']!r}: {message}" if where else message


def place_file(name: str) -> Path:
    """The file of a place: `name` itself if it ends in .yaml, else the one in cluster_configs/."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    package = Path(str(resources.files("clusterlob_gpu")))
    folders = [Path("cluster_configs"), package / "cluster_configs", package.parent / "cluster_configs"]
    for folder in folders:
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(
        f"--workers {name}: no such place; there are {', '.join(known)}, or give a number or a file"
    )


def kubernetes_manifest(place: KubernetesPlace, name: str) -> dict[str, Any]:
    """The DaskCluster resource of a place: its workers, and a scheduler without GPU, files or secrets."""
    operator = import_extra("dask_kubernetes.operator", "cluster")
    manifest: dict[str, Any] = operator.make_cluster_spec(
        name=name,
        image=place.image,
        n_workers=place.n_workers,
        env=place.env,
        worker_command=place.worker_args(),
        idle_timeout=place.idle_timeout // US_PER_SECOND,
    )
    worker, scheduler = (manifest["spec"][part]["spec"] for part in ("worker", "scheduler"))
    gpus = {"nvidia.com/gpu": str(place.gpus)} if place.gpus else {}
    worker["containers"][0] |= pod_access(place) | pod_resources(place.cpu, place.memory, gpus)
    container = worker["containers"][0]
    memory = {name: value for name, value in heap.AT_START.items() if name not in place.env}
    container["env"] = [
        *container["env"],
        *({"name": name, "value": value} for name, value in memory.items()),
    ]
    worker["volumes"] = pod_volumes(place)
    scheduler["containers"][0] |= pod_resources(1, place.scheduler_memory)
    return manifest


def pod_resources(cpu: float, memory: int, more: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a container gets: no more and no less than it asks for."""
    amounts = {"cpu": f"{cpu:g}", "memory": str(int(memory)), **(more or {})}
    return {"resources": {"limits": amounts, "requests": dict(amounts)}}


def pod_access(place: KubernetesPlace) -> dict[str, Any]:
    """Mounts and secrets of a container that computes."""
    mounts = [
        {"name": f"volume-{i}", "mountPath": volume.mount_path, "readOnly": volume.read_only}
        for i, volume in enumerate(place.volumes)
    ]
    return {"volumeMounts": mounts, "envFrom": [{"secretRef": {"name": name}} for name in place.secrets]}


def pod_volumes(place: KubernetesPlace) -> list[dict[str, Any]]:
    """The claims that `pod_access` mounts."""
    return [
        {"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": volume.claim}}
        for i, volume in enumerate(place.volumes)
    ]


def slurm_time(us: int) -> str:
    """A duration as SLURM writes it, rounded up to seconds: D-HH:MM:SS."""
    minutes, seconds = divmod(math.ceil(us / US_PER_SECOND), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less where its container allows less."""
    from distributed.system import MEMORY_LIMIT

    return int(MEMORY_LIMIT)


def import_extra(module: str, extra: str) -> Any:
    """A module that only some places need; raises InputError saying which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{module} cannot be imported ({one_line(error)}): pip install 'clusterlob-gpu[{extra}]'"
        ) from None


def one_line(error: BaseException) -> str:
    """Message of an error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
