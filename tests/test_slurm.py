"""A real SLURM: workers in its jobs, jobs that end, and commands that are submitted."""

from __future__ import annotations

import datetime as dt
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import clusterlob_gpu
from clusterlob_gpu import pipeline
from clusterlob_gpu.config import make_config
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.lake.synthetic import ingest_synthetic, make_market
from clusterlob_gpu.places import LocalPlace, SlurmPlace, ThreadsPlace
from clusterlob_gpu.submit import render_submission, submit
from clusterlob_gpu.workers import open_workers

ROOT = Path(__file__).parents[1]


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def job_state(job: str) -> str:
    shown = run("scontrol", "show", "job", job)
    return shown.split("JobState=")[1].split()[0]


def jobs_left() -> list[str]:
    return run("squeue", "--noheader", "--format=%i").split()


@pytest.fixture(scope="module")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The configuration of a SLURM of our own, for as long as these tests run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "CLUSTERLOB_SLURM": str(tmp_path_factory.mktemp("slurm")),
        "CLUSTERLOB_SLURM_PORT": str(port),
    }
    script, env = str(ROOT / "scripts" / "slurm"), os.environ | settings
    up = subprocess.run([script, "up"], env=env, capture_output=True, text=True, check=False)
    if up.returncode == 3:
        pytest.skip(up.stderr.strip())
    assert up.returncode == 0, up.stderr
    yield up.stdout.strip()
    subprocess.run([script, "down"], env=env, check=True)


@pytest.fixture(autouse=True)
def slurm(slurm_conf: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    package = Path(clusterlob_gpu.__file__).parents[1]
    monkeypatch.setenv("SLURM_CONF", slurm_conf)
    # The jobs find this module and the package under test.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), str(Path(__file__).parent)]))
    monkeypatch.setenv("DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT", "500ms")
    monkeypatch.chdir(tmp_path)
    yield
    wait_until(lambda: not jobs_left(), 30)


def cpu_place(**fields: Any) -> SlurmPlace:
    """Jobs of one CPU worker, each of which holds a pretended GPU."""
    small = {"cores": 1, "memory": "1GiB", "walltime": "10m", "lifetime_margin": "1m"}
    command = "distributed.cli.dask_worker"
    return SlurmPlace(**(small | {"worker_command": command, "interface": "lo", "gpus": 1} | fields))


def job_of_task(seconds: float, _: int) -> str:
    time.sleep(seconds)
    return os.environ["SLURM_JOB_ID"]


def leave_job(folder: Path, x: int) -> int:
    (folder / f"{x}.job").write_text(os.environ["SLURM_JOB_ID"])
    time.sleep(1)
    return x * x


def test_workers__jobs_come_with_the_work_and_hold_a_gpu_each() -> None:
    with open_workers(cpu_place(min_jobs=0, max_jobs=2), lambda *_: None) as workers:
        assert workers.name == "0 to 2 SLURM jobs x 1 workers x 1 threads"
        found = workers.map("many", partial(job_of_task, 0.5), range(20))
        jobs = set(found)
        shown = [run("scontrol", "show", "job", job) for job in jobs]
    assert len(jobs) == 2
    for job in shown:
        assert "JobState=RUNNING" in job
        assert "TimeLimit=00:10:00" in job
        assert "gres:gpu:1" in job
        assert "NumCPUs=1 " in job
    wait_until(lambda: not jobs_left(), 10)


def test_workers__a_cancelled_job_changes_no_result_and_is_replaced(tmp_path: Path) -> None:
    def cancel() -> None:
        file = tmp_path / "2.job"
        wait_until(lambda: file.exists() and file.read_text())
        cancelled.append(file.read_text())
        run("scancel", *cancelled)

    cancelled: list[str] = []
    killer = threading.Thread(target=cancel)
    with open_workers(cpu_place(processes=2), lambda *_: None) as workers:
        assert workers.name == "1 SLURM jobs x 2 workers x 1 threads"
        killer.start()
        assert workers.map("cancel one", partial(leave_job, tmp_path), range(5)) == [0, 1, 4, 9, 16]
        killer.join()
    assert (tmp_path / "4.job").read_text() not in cancelled


def test_workers__one_that_ends_before_its_walltime_is_replaced(tmp_path: Path) -> None:
    place = cpu_place(walltime="1m", lifetime_margin="53s")
    with open_workers(place, lambda *_: None) as workers:
        assert workers.map("outlive", partial(leave_job, tmp_path), range(8)) == [x * x for x in range(8)]
    jobs = {file.read_text() for file in tmp_path.glob("*.job")}
    assert len(jobs) > 1
    wait_until(lambda: {job_state(job) for job in jobs} <= {"COMPLETED", "CANCELLED"})


def test_run__two_jobs_give_the_results_of_local_workers_and_of_none(tmp_path: Path) -> None:
    start, end = dt.date(2024, 5, 1), dt.date(2024, 5, 4)
    market = make_market(start=start, days=4, trades_per_day=4_000, snapshots_per_day=9_000)
    ingest_synthetic(tmp_path / "lake", market)
    places = {
        "threads": ThreadsPlace(n_workers=2),
        "local": LocalPlace(n_workers=2),
        "slurm": cpu_place(min_jobs=2, max_jobs=2),
    }
    found = []
    for name, place in places.items():
        request = pipeline.RunRequest(
            lake=tmp_path / "lake",
            exchange=market.exchange,
            symbols=market.symbols,
            start=start,
            end=end,
            out=tmp_path / name / "run",
            config=make_config({}, ["n_init=1", "bucket=30m", "horizons=[1h]", "keep_trades=true"]),
            pictures=False,
        )
        with open_workers(place, lambda *_: None) as workers:
            out = pipeline.run_cluster(request, workers)
        files = [*(out / "results").rglob("*.parquet"), out / "model.json"]
        found.append({str(path.relative_to(out)): path.read_bytes() for path in files if path.is_file()})
    assert len(found[0]) == 9
    assert found[0] == found[1] == found[2]


def test_workers__refused_job_is_one_line() -> None:
    with (
        open_workers(cpu_place(queue="nowhere"), lambda *_: None) as workers,
        pytest.raises(InputError, match=r"^SLURM refuses the workers' job: .*invalid partition") as caught,
    ):
        workers.map("any", abs, [1])
    assert "\n" not in str(caught.value)


# ---- submit -----------------------------------------------------------------------------------------

COMMAND = ["run", "cluster", "--lake", "my lake", "--set", "k=3"]

DRIVER = """#!/usr/bin/env bash
echo "${SLURM_RESTART_COUNT:-0} $PWD $*" >> driver.txt
[[ ${SLURM_RESTART_COUNT:-0} == 0 && -e wait ]] || exit 7
trap 'exit 130' TERM
sleep 100 &
wait
"""


@pytest.fixture
def place_file(tmp_path: Path) -> Path:
    """A place whose Python only writes down how it was called."""
    driver = tmp_path / "pretended python"
    driver.write_text(DRIVER)
    driver.chmod(0o755)
    file = tmp_path / "site.yaml"
    file.write_text(
        f"kind: slurm\npython: '{driver}'\ndriver: {{cores: 1, memory: 100MiB, walltime: 5m}}\n"
        "job_script_prologue: ['echo prologue > prologue.txt']\n"
    )
    return file


@pytest.fixture
def spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_submit__dry_run_is_a_job_that_slurm_takes(place_file: Path, spaced: Path) -> None:
    text = render_submission(str(place_file), COMMAND)
    run("sbatch", "--test-only", stdin=text)
    assert {
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --mem=100M",
        "#SBATCH --time=0-00:05:00",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
    } <= set(text.splitlines())
    assert not jobs_left()
    assert not list(spaced.iterdir())


def test_submit__runs_the_command_with_the_place(place_file: Path, spaced: Path) -> None:
    job = submit("../site.yaml", COMMAND)
    wait_until(lambda: job_state(job) == "FAILED")
    arguments = f"run cluster --lake my lake --set k=3 --workers {place_file}"
    main = "-c from clusterlob_gpu.cli import main; main()"
    assert (spaced / "driver.txt").read_text() == f"0 {spaced} {main} {arguments}\n"
    assert (spaced / "prologue.txt").exists()
    assert "ExitCode=7:0" in run("scontrol", "show", "job", job), "the command's own exit code"
    assert (spaced / "logs" / "slurm" / f"clusterlob-{job}.log").exists()


def test_submit__is_queued_again_when_its_walltime_ends(place_file: Path, spaced: Path) -> None:
    (spaced / "wait").touch()
    job = submit(str(place_file), COMMAND)
    wait_until((spaced / "driver.txt").exists)
    time.sleep(0.5)
    # What SLURM sends two minutes before the end of the walltime.
    run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: len((spaced / "driver.txt").read_text().splitlines()) == 2)
    assert [line[0] for line in (spaced / "driver.txt").read_text().splitlines()] == ["0", "1"]
    wait_until(lambda: job_state(job) == "FAILED")


def test_submit__refused_job_is_one_line(place_file: Path, spaced: Path) -> None:
    place_file.write_text(place_file.read_text() + "queue: nowhere\n")
    with pytest.raises(InputError, match=r"^SLURM refuses the job: .*invalid partition") as caught:
        submit(str(place_file), COMMAND)
    assert "\n" not in str(caught.value)


def test_submit__no_sbatch_is_one_line(
    place_file: Path, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as bare:
        bare.setenv("PATH", str(spaced))
        with pytest.raises(InputError, match=r"^sbatch is not found"):
            submit(str(place_file), COMMAND)


def test_script__up_again_does_nothing(slurm_conf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERLOB_SLURM", str(Path(slurm_conf).parent))
    script = str(ROOT / "scripts" / "slurm")
    assert run(script, "up").strip() == slurm_conf
    assert "idle" in run(script, "status")
