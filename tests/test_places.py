"""Places: one model per kind, every field checked, and what each hands to the library that starts it."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import dask_kubernetes
import pytest
import yaml
from jsonschema import Draft202012Validator

from clusterlob_gpu import cores
from clusterlob_gpu.errors import ClusterlobError, ConfigError, InputError
from clusterlob_gpu.places import (
    ConnectPlace,
    CudaPlace,
    KubernetesPlace,
    LocalPlace,
    Place,
    SlurmPlace,
    ThreadsPlace,
    kubernetes_manifest,
    machine_memory,
    read_place,
    slurm_time,
)
from clusterlob_gpu.workers import open_workers

GPU_NOTES = Path(__file__).parents[1].parent / "shared" / "gpu" / "api_manifest.json.gz"
"""Signatures of the real GPU libraries, where a checkout has them beside it."""


def test_read_place__numbers_names_and_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("kind: threads\nn_workers: 5\n")
    assert read_place(None) == Place(kind="threads", n_workers=cores.available())
    assert read_place("3") == Place(kind="local", n_workers=3, threads_per_worker=1)
    assert read_place(str(file)) == Place(kind="threads", n_workers=5)
    assert read_place("local_cpu") == Place(kind="local", n_workers=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: moon\n", "kind = 'moon': "),
        ("kind: local\nn_workers: 0\n", "n_workers = 0: .*greater than or equal to 1"),
        ("kind: local\nworkers: 3\n", "workers = 3: "),
        ("n_workers: 3\n", "kind = "),
        ("[1, 2]\n", "must hold keys and values, found a list"),
        ("kind: [\n", "not valid YAML"),
    ],
)
def test_read_place__broken_file_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_place(str(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "0", "-1", ""])
def test_read_place__unknown_name_tells_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--workers {name}: no such place; there are .*local_cpu"):
        read_place(name)


def test_read_place__absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        read_place(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("name", "kind", "described"),
    [
        ("local_cpu", LocalPlace, "2 local workers x 1 threads"),
        ("local_cuda", CudaPlace, "all local GPUs x 1 threads"),
        ("slurm_gpu", SlurmPlace, "1 to 8 SLURM jobs x 1 workers x 1 threads"),
        ("kubernetes_gpu", KubernetesPlace, "1 to 8 Kubernetes workers x 1 threads"),
        ("connect", ConnectPlace, "workers of tcp://127.0.0.1:8786"),
    ],
)
def test_read_place__every_shipped_file(name: str, kind: type[Place], described: str) -> None:
    place = read_place(name)
    assert type(place) is kind
    assert place.describe() == described


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: slurm\nmin_jobs: 3\n", "min_jobs = 3: must not be above max_jobs = 1"),
        ("kind: slurm\nlifetime_margin: 2h\n", "lifetime_margin: must be below walltime, or .*"),
        ("kind: slurm\nwalltime: soon\n", "walltime = 'soon': must be a positive duration .*"),
        ("kind: slurm\ngpus: 2\n", "processes = 1: dask_cuda.cli has one for each of 2 gpus"),
        ("kind: slurm\ndriver: {cpus: 3}\n", r"driver\.cpus = 3: Extra inputs are not permitted"),
        ("kind: kubernetes\n", "image = .*: Field required"),
        ("kind: kubernetes\nimage: i\nmemory: lots\n", "memory = 'lots': could not parse value .*"),
        ("kind: kubernetes\nimage: i\nname: My_Run\n", "name = 'My_Run': .*"),
        ("kind: kubernetes\nimage: i\nn_workers: 3\nmax_workers: 2\n", "max_workers = 2: is below n_work.*"),
        ("kind: connect\naddress: tcp://a:1\ntls: {ca_file: a, cert: b}\n", r"tls\.key = .*: Field required"),
    ],
)
def test_read_place__fields_of_one_kind(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{file}: {message}$") as caught:
        read_place(str(file))
    assert "\n" not in str(caught.value)


def test_place__what_a_worker_has() -> None:
    threads, local = ThreadsPlace(n_workers=5), LocalPlace(n_workers=4)
    assert (threads.workers, threads.threads_per_worker) == ((1, 1), 5)
    assert (local.workers, local.memory_per_worker) == ((4, 4), machine_memory() // 4)
    assert LocalPlace(memory_limit="2GiB").memory_per_worker == 2 * 2**30
    slurm = SlurmPlace(gpus=4, processes=4, max_jobs=3, memory="64GiB")
    assert (slurm.workers, slurm.memory_per_worker) == ((4, 12), 16 * 2**30)
    pods = KubernetesPlace(image="i", n_workers=2, max_workers=5, memory="8GB")
    assert (pods.workers, pods.memory_per_worker) == ((2, 5), 8_000_000_000)
    connect = ConnectPlace(address="tcp://127.0.0.1:1")
    assert (connect.workers, connect.memory_per_worker) == (None, None)


@pytest.mark.parametrize(
    ("us", "text"), [(1, "0-00:00:01"), (90_000_000, "0-00:01:30"), (93_784_000_000, "1-02:03:04")]
)
def test_slurm_time__rounds_up_to_seconds(us: int, text: str) -> None:
    assert slurm_time(us) == text


# ---- GPUs of this machine ---------------------------------------------------------------------------


def test_cuda__passes_only_keywords_that_dask_cuda_has() -> None:
    if not GPU_NOTES.exists():
        pytest.skip("no manifest of the GPU libraries beside this checkout")
    api = json.loads(gzip.decompress(GPU_NOTES.read_bytes()))["api"]
    options = CudaPlace(n_workers=2, device_memory_limit="30GB", local_directory="/scratch").options()
    assert set(options) <= {name for name, *_ in api["dask_cuda.LocalCUDACluster"]["__init__"]["p"]}
    # The options of `dask cuda worker` are CUDAWorker's keywords.
    flags = SlurmPlace(device_memory_limit=0.8).device_flags()
    named = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    assert named <= {name for name, *_ in api["dask_cuda.CUDAWorker"]["__init__"]["p"]}


def test_cuda__a_worker_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, LocalCluster stands for dask-cuda's subclass of it; the keywords are what is tested."""
    from distributed import LocalCluster

    asked: dict[str, Any] = {}

    class LocalCUDACluster(LocalCluster):
        def __init__(self, **options: Any) -> None:
            asked.update(options)
            passed = ("n_workers", "threads_per_worker", "dashboard_address")
            super().__init__(processes=False, **{name: options[name] for name in passed})

    dask_cuda = ModuleType("dask_cuda")
    dask_cuda.LocalCUDACluster = LocalCUDACluster  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dask_cuda", dask_cuda)
    place = CudaPlace(n_workers=1, rmm_pool_size=0.5, protocol="ucx")
    with open_workers(place, lambda *_: None) as workers:
        assert workers.map("square", abs, [-1, 2]) == [1, 2]
    assert asked == {
        "n_workers": 1,
        "threads_per_worker": 1,
        "memory_limit": "auto",
        "local_directory": None,
        "protocol": "ucx",
        "rmm_pool_size": 0.5,
        "enable_cudf_spill": True,
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
    }


@pytest.mark.parametrize(
    ("place", "module", "extra"),
    [
        (CudaPlace(), "dask_cuda", "gpu-cu13"),
        (SlurmPlace(), "dask_jobqueue", "cluster"),
        (KubernetesPlace(image="i"), "dask_kubernetes.operator", "cluster"),
    ],
)
def test_open_workers__absent_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, place: Place, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with (
        open_workers(place, lambda *_: None) as workers,
        pytest.raises(InputError, match=rf"^{module} cannot be imported .*'clusterlob-gpu\[{extra}\]'$"),
    ):
        workers.map("any", abs, [1])


# ---- SLURM ------------------------------------------------------------------------------------------


def script_of(place: SlurmPlace) -> str:
    """The job that dask-jobqueue would submit."""
    from dask_jobqueue.slurm import SLURMJob

    options = place.options()
    del options["scheduler_options"]
    return str(SLURMJob("tcp://10.0.0.1:8786", name="w", **options).job_script())


def test_slurm__job_of_two_gpus(tmp_path: Path) -> None:
    place = SlurmPlace(
        gpus=2,
        processes=2,
        cores=16,
        memory="64GiB",
        walltime="4h",
        lifetime_margin="10m",
        queue="gpu",
        account="desk",
        interface="lo",
        log_directory=str(tmp_path),
        local_directory="/scratch",
        job_extra_directives=["--constraint=h100"],
        job_script_prologue=["module load cuda"],
        python="/opt/my env/bin/python",
    )
    lines = script_of(place).splitlines()
    assert {
        "#SBATCH -p gpu",
        "#SBATCH -A desk",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --mem=64G",
        "#SBATCH -t 0-04:00:00",
        "#SBATCH --gres=gpu:2",
        "#SBATCH --constraint=h100",
        "export MALLOC_ARENA_MAX=1",
        "export ARROW_DEFAULT_MEMORY_POOL=system",
        "module load cuda",
        "export DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION=13800s",
        "export DASK_DISTRIBUTED__WORKER__LIFETIME__STAGGER=150s",
    } <= set(lines)
    worker = lines[-1]
    assert worker.startswith("'/opt/my env/bin/python' -m dask_cuda.cli tcp://10.0.0.1:8786 --name w ")
    # Each of the two workers has one thread and half of the job's memory.
    assert " --nthreads 1 --memory-limit 32.00GiB " in worker
    assert worker.endswith("--enable-cudf-spill --rmm-pool-size 0.9 --interface lo")
    assert "--lifetime" not in worker, "dask-cuda has no such option"


def test_slurm__memory_per_gpu_replaces_that_of_the_job(tmp_path: Path) -> None:
    place = SlurmPlace(log_directory=str(tmp_path), job_extra_directives=["--mem-per-gpu=64G"])
    assert [line for line in script_of(place).splitlines() if "--mem" in line and "SBATCH" in line] == [
        "#SBATCH --mem-per-gpu=64G"
    ]


def test_slurm__workers_on_cpus(tmp_path: Path) -> None:
    place = SlurmPlace(
        worker_command="distributed.cli.dask_worker",
        gpus=0,
        processes=2,
        threads_per_worker=3,
        log_directory=str(tmp_path),
        protocol="tcp",
    )
    script = script_of(place)
    assert "gres" not in script
    assert f"{sys.executable} -m distributed.cli.dask_worker tcp://10.0.0.1:8786 " in script
    assert "--nthreads 3 --memory-limit 16.00GiB --nworkers 2 --nanny" in script
    assert script.rstrip().endswith("--protocol tcp")
    assert "rmm" not in script


# ---- Kubernetes -------------------------------------------------------------------------------------


def crd_schema(name: str) -> dict[str, Any]:
    """The schema that a Kubernetes cluster checks a resource against, of the installed operator."""
    operator = Path(dask_kubernetes.__file__).parent / "operator"
    crd = operator / "deployment" / "helm" / "dask-kubernetes-operator" / "crds" / f"{name}.yaml"
    schema = yaml.safe_load(crd.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    # The resource's own head is checked by Kubernetes, not by the schema.
    schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    return strict(schema)


def strict(schema: Any) -> Any:
    """The same schema, refusing the fields that it does not name; Kubernetes would drop them silently."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {}
    return closed | {key: strict(part) for key, part in schema.items()}


@pytest.fixture
def pods() -> KubernetesPlace:
    return KubernetesPlace(
        image="clusterlob-gpu:1",
        n_workers=2,
        max_workers=4,
        cpu=8,
        memory="64GiB",
        env={"LAKE": "/data/lake"},
        secrets=["s3"],
        volumes=[{"claim": "lake", "mount_path": "/data", "read_only": True}],
        idle_timeout="10m",
    )


def test_kubernetes__manifest_is_what_the_operator_takes(pods: KubernetesPlace) -> None:
    manifest = kubernetes_manifest(pods, "clusterlob-1")
    Draft202012Validator(crd_schema("daskcluster")).validate(manifest)
    assert manifest["spec"]["idleTimeout"] == 600
    # YAML and JSON can hold it.
    assert yaml.safe_load(yaml.safe_dump(manifest)) == json.loads(json.dumps(manifest)) == manifest


def test_kubernetes__workers_have_gpu_files_and_secrets_and_the_scheduler_has_none(
    pods: KubernetesPlace,
) -> None:
    spec = kubernetes_manifest(pods, "clusterlob-1")["spec"]
    assert spec["worker"]["replicas"] == 2
    worker, scheduler = (spec[part]["spec"]["containers"][0] for part in ("worker", "scheduler"))
    amounts = {"cpu": "8", "memory": str(64 * 2**30), "nvidia.com/gpu": "1"}
    assert worker["resources"] == {"limits": amounts, "requests": amounts}
    assert worker["volumeMounts"] == [{"name": "volume-0", "mountPath": "/data", "readOnly": True}]
    assert worker["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert spec["worker"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "lake"}
    assert worker["args"][:7] == [
        *["dask", "cuda", "worker", "--nthreads", "1", "--memory-limit", str(64 * 2**30)],
    ]
    assert {"name": "LAKE", "value": "/data/lake"} in worker["env"]
    assert "nvidia" not in json.dumps(scheduler)
    assert {"name": "MALLOC_ARENA_MAX", "value": "1"} in worker["env"]
    assert all(one in worker["env"] for one in scheduler["env"])
    assert "MALLOC" not in json.dumps(scheduler)
    assert not {"envFrom", "volumeMounts"} & set(scheduler)


def test_kubernetes__no_cluster_is_one_line(
    pods: KubernetesPlace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        open_workers(pods, lambda *_: None) as workers,
        pytest.raises(
            ClusterlobError, match=r"^2 to 4 Kubernetes workers x 1 threads: cannot start: "
        ) as caught,
    ):
        workers.map("any", abs, [1])
    assert "\n" not in str(caught.value)
