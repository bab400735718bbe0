"""The stand-in for the GPU libraries: what it refuses, that it computes right, and what it counts."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import standin

LACKS, NO, HOST = (
    r"stand-in lacks .*; add it",
    r"26\.10\.\d+ has no",
    r"Unsupported type <class 'numpy.ndarray'>",
)


def parquet() -> io.BytesIO:
    table = pa.table(
        {
            "k": [1, 1, 2, 2],
            "a": [3, 1, 2, None],
            "f": [1.0, float("nan"), None, 2.0],
            "levels": pa.array([[5, 4], None, [], [7, None]], pa.list_(pa.int64())),
            "name": ["x", "y", None, "z"],
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=2)
    return io.BytesIO(file.getvalue())


def given() -> dict[str, Any]:
    """What a piece of program finds besides the GPU libraries."""
    return {"np": np, "pd": pd, "pa": pa, "file": parquet(), "host": np.arange(4)}


SETUP = """
import cudf, cupy, rmm
from cuml.cluster import KMeans
x = cupy.asarray(host)
df = cudf.read_parquet(file)
"""


def run(expression: str, **options: Any) -> Any:
    return standin.run(f"{SETUP}\nresult = {expression}", **given(), **options)["result"]


# ---- Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "error", "message"),
    [
        # Names that are not there.
        ("cudf.merge_asof(df, df)", AttributeError, rf"{NO} cudf\.merge_asof"),
        ("cudf.isna(df)", AttributeError, NO),
        ("df['a'].idxmax()", AttributeError, NO),
        ("df.combine_first(df)", AttributeError, NO),
        ("df['levels'].list.offsets", AttributeError, NO),
        ("cupy.nanquantile(x, 0.5)", AttributeError, r"cupy 14\.2\.0 has no cupy\.nanquantile"),
        ("cupy.cuda.Graphics", AttributeError, r"has no cupy\.cuda\.Graphics"),
        ("x.to_host()", AttributeError, r"has no cupy\.ndarray\.to_host"),
        ("rmm.mr.StackMemoryResource()", AttributeError, NO),
        # Keywords that are not taken.
        ("cudf.read_parquet(file, thrift_container_size_limit=1)", TypeError, "thrift_container_size_limit"),
        ("df.sort_values('a', stable=True)", TypeError, "unexpected keyword argument 'stable'"),
        ("x.sum(where=x > 1)", TypeError, "unexpected keyword argument 'where'"),
        ("cupy.add(x, x, where=x > 1)", TypeError, "Wrong arguments"),
        ("KMeans(k=3)", TypeError, "unexpected keyword argument 'k'"),
        ("KMeans(3)", TypeError, "positional"),
        # There, but raising.
        ("df.groupby('k').ohlc()", NotImplementedError, "a stub that raises"),
        ("df['a'].groupby(df['k']).value_counts()", NotImplementedError, "a stub that raises"),
        ("df['a'].rolling(2).median()", NotImplementedError, "a stub that raises"),
        ("df['a'].rolling(2, closed='left')", NotImplementedError, "closed"),
        ("cupy.maximum.accumulate(x)", NotImplementedError, "is not supported yet"),
        ("cupy.multiply.at(x, x, 2)", NotImplementedError, "is not supported yet"),
        ("cupy.add.at(x, x, 1)", TypeError, "int64"),
        ("cupy.searchsorted(x, np.int64(2))", NotImplementedError, "Only python scalars"),
        # There, but not in the stand-in.
        ("cudf.crosstab", NotImplementedError, LACKS),
        ("cudf.read_parquet(file, filters=[('a', '>', 1)])", NotImplementedError, LACKS),
        ("cupy.linalg.norm(x)", NotImplementedError, LACKS),
        # Memory of the host.
        ("np.asarray(x)", TypeError, "Implicit conversion to a NumPy array is not allowed"),
        ("np.sum(x)", TypeError, "use cupy.sum"),
        ("np.add(x, x)", TypeError, "does not support ufuncs"),
        ("x + host", TypeError, HOST),
        ("host + x", TypeError, HOST),
        ("cupy.sum(host)", TypeError, HOST),
        ("cupy.concatenate([x, host])", TypeError, HOST),
        ("cupy.isin(x, [1, 2])", TypeError, "must be a cupy.ndarray"),
        ("range(x[1])", TypeError, "cannot be interpreted as an integer"),
        ("cupy.zeros(x[1])", TypeError, "numbers of the host"),
        ("np.asarray(df['a'])", TypeError, "Implicit conversion to a host NumPy array"),
        ("pd.Series(df['a'])", TypeError, "Implicit conversion"),
        ("pa.array(df['a'])", TypeError, "Implicit conversion"),
        ("list(df['a'])", TypeError, "not iterable"),
        ("df['a'].tolist()", TypeError, "does not support conversion"),
        ("df['a'] + host", TypeError, HOST),
        ("cupy.asarray(df['levels'])", NotImplementedError, "CuPy does not support"),
        # What CuPy leaves undefined.
        ("x.__setitem__(cupy.asarray([1, 1]), cupy.asarray([2, 3]))", ValueError, "occurs twice"),
        ("x[cupy.asarray([9])]", IndexError, "out of bounds"),
    ],
)
def test_refused(expression: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(expression)


PIPELINE = """
def as_of(trades, book):
    {body}

trades, book = cudf.DataFrame({{"ts": x * 10}}), cudf.DataFrame({{"ts": x * 7}})
result = as_of(trades, book)
"""


def test_run__a_planted_use_of_what_cudf_lacks_fails() -> None:
    by_search = "return book['ts'].searchsorted(trades['ts'], side='right') - 1"
    assert standin.run(SETUP + PIPELINE.format(body=by_search), **given())["result"].get().tolist() == [
        0,
        1,
        2,
        3,
    ]
    planted = "return cudf.merge_asof(trades, book, on='ts')"
    with pytest.raises(AttributeError, match=r"has no cudf\.merge_asof"):
        standin.run(SETUP + PIPELINE.format(body=planted), **given())


def test_mirror__the_stand_in_cannot_offer_more_than_the_library() -> None:
    from standin.manifest import Room, mirror

    with pytest.raises(AssertionError, match=r"cudf\.DataFrame has no merge_asof"):

        @mirror("cudf.DataFrame")
        class DataFrame:
            def merge_asof(self, other: object) -> None: ...

    with pytest.raises(AssertionError, match="cudf has no merge_asof"):
        Room("cudf", {"merge_asof": min})


# ---- Computed -----------------------------------------------------------------------------------------

_rng = np.random.default_rng(1)
VALUES = {
    "i": _rng.integers(0, 9, 20),
    "f": _rng.normal(size=20).astype(np.float32),
    "d": np.where(np.arange(20) % 7, _rng.normal(size=20), np.nan),
    "m": _rng.normal(size=(3, 5)),
}


EXPRESSIONS = """
    (i + 3) // 2; i * d - f; f * 2; i.sum(); f.mean(); m.sum(axis=1); m.T[2]; m[1, ::-2]
    m[:, None].shape; xp.where(i > 3, d, 0); xp.nonzero(i)[0]; xp.flatnonzero(i > 3)
    xp.searchsorted(xp.sort(i), i, side="right"); xp.cumsum(i); xp.diff(d); xp.bincount(i, minlength=12)
    xp.bincount(i, weights=f); xp.unique(i); xp.unique(i, return_counts=True)[1]; xp.isin(i, i[:2])
    xp.isnan(d); xp.isfinite(d); xp.minimum(i, 4); xp.clip(d, -1, 1); xp.abs(f); xp.log1p(xp.abs(f))
    xp.sqrt(i); xp.floor(d); xp.count_nonzero(i); xp.argsort(i, kind="stable")
    xp.lexsort(xp.stack([d, i])); xp.take(d, i); xp.take_along_axis(m, m.argsort(axis=1), 1)
    xp.repeat(i, 2); xp.tile(f, 2); xp.broadcast_to(f, (2, 20)); xp.moveaxis(m, 0, 1)
    m.reshape(5, 3).ravel(); i.astype("float32"); f.view("int32"); xp.concatenate([i, i[::-1]])
    xp.full((2, 3), 7); xp.zeros_like(m); xp.arange(3, 9, 2); xp.linspace(0, 1, 5); divmod(i, 4)[1]
    i >> 1; -f; ~(i > 2); i % 3 == 1; xp.histogram(f, bins=4)[0]; xp.percentile(f, 30); xp.nansum(d)
    xp.interp(f, xp.arange(5), m[0]); xp.add.reduce(i); xp.array_equal(i, i)
    xp.lib.stride_tricks.sliding_window_view(f, 3).sum(axis=1); i.max() - i.min()
    xp.float32(2) * i; m @ m.T; xp.int64(7) // i[i > 0]
    xp.maximum(f, d); (f[1] > 0) & (f[2] > 0); xp.ascontiguousarray(m.T); i.argmax()
"""


@pytest.mark.parametrize(
    "expression",
    [each.strip() for line in EXPRESSIONS.split("\n") for each in line.split(";") if each.strip()],
)
def test_cupy__agrees_with_numpy(expression: str) -> None:
    with np.errstate(all="ignore"):
        expected = np.asarray(eval(expression, {"xp": np, **VALUES}))
    with standin.installed():
        import cupy

        found = eval(
            expression, {"xp": cupy, **{name: cupy.asarray(value) for name, value in VALUES.items()}}
        )
        if isinstance(found, tuple | int):
            assert found == expected.tolist() or found == tuple(expected.tolist())
            return
        assert isinstance(found, cupy.ndarray)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.get(), expected)


def test_cupy__views_writes_and_copies() -> None:
    with standin.installed() as device:
        import cupy

        host = np.arange(6)
        x = cupy.asarray(host)
        row = x.reshape(2, 3)[1]
        row += 10
        x[0:2] = cupy.asarray([7, 8])
        x[cupy.asarray([2])] = 5
        assert host.tolist() == list(range(6))
        assert x.get().tolist() == [7, 8, 5, 13, 14, 15]
        copied = x.get()
        copied[:] = 0
        assert int(x[0]) == 7
        assert bool(x.sum() > 3)
        assert float(x[1:2]) == 8.0
        assert x[x > 13].get().tolist() == [14, 15]
        assert cupy.may_share_memory(x, row)
        assert not cupy.may_share_memory(x, row.copy())
        counts = cupy.zeros(3, cupy.float32)
        cupy.add.at(counts, cupy.asarray([1, 1, 2]), 1)
        assert counts.get().tolist() == [0, 2, 1]
        assert cupy.get_array_module(x) is cupy
        assert cupy.get_array_module(host) is np
        assert device.calls["cupy.asarray"] == 4


def test_cudf__nulls_and_nans_are_told_apart() -> None:
    with standin.installed():
        import cudf

        df = cudf.read_parquet(parquet(), columns=["f", "a", "k", "not there"])
        assert list(df.columns) == ["f", "a", "k"]
        assert [str(dtype) for dtype in df.dtypes] == ["float64", "int64", "int64"]
        assert df["f"].null_count == 1
        assert df["f"].isna().to_numpy().tolist() == [False, True, True, False]
        np.testing.assert_array_equal(df["a"].to_cupy().get(), [3.0, 1.0, 2.0, np.nan])
        assert df["a"].fillna(-1).to_cupy().get().tolist() == [3, 1, 2, -1]
        assert df["a"].sum() == 6
        assert (df["a"] + 1).to_arrow().to_pylist() == [4, 2, 3, None]
        assert df[df["a"] > 1]["k"].to_numpy().tolist() == [1, 2]
        assert cudf.Series([1.0, np.nan]).null_count == 1
        assert cudf.Series(np.array([1.0, np.nan]), nan_as_null=False).null_count == 0
        groups = cudf.read_parquet(parquet(), row_groups=[1])
        assert groups["name"].to_arrow().to_pylist() == [None, "z"]


def test_cudf__lists() -> None:
    with standin.installed():
        import cudf

        levels = cudf.read_parquet(parquet(), columns=["levels"])["levels"]
        assert levels.list.len().to_arrow().to_pylist() == [2, None, 0, 2]
        assert levels.list.leaves.to_arrow().to_pylist() == [5, 4, 7, None]
        assert levels.list.get(1).to_arrow().to_pylist() == [4, None, None, None]


def test_cudf__tables_agree_with_pandas() -> None:
    left = pd.DataFrame({"k": [2, 1, 2, 3], "v": [1, 2, 3, 4], "w": [0.5, 0.25, 1.0, 2.0]})
    right = pd.DataFrame({"k": [1, 2], "z": [10, 20]})
    with standin.installed():
        import cudf
        import cupy

        df, other = cudf.from_pandas(left), cudf.from_pandas(right)
        pd.testing.assert_frame_equal(df.to_pandas(), left)
        summed = df.groupby("k", sort=True).agg({"v": "sum", "w": "max"}).to_pandas()
        pd.testing.assert_frame_equal(summed, left.groupby("k").agg({"v": "sum", "w": "max"}))
        # Nothing may lean on the order of groups that were not sorted, or of a join.
        assert df.groupby("k")["v"].sum().index.to_numpy().tolist() == [3, 1, 2]
        joined = df.merge(other, on="k", how="left")
        assert joined["z"].null_count == 1
        assert joined["z"].dtype == np.int64
        assert joined["v"].to_numpy().tolist() == [4, 3, 2, 1]
        ordered = df.sort_values(["k", "w"], ascending=[True, False], ignore_index=True)
        assert ordered["v"].to_numpy().tolist() == [2, 3, 1, 4]
        both = cudf.concat([df, df], ignore_index=True)
        assert len(both.drop_duplicates()) == 4
        df["n"] = cupy.arange(4) * 0.5
        assert df[["v", "n"]].to_cupy().get().tolist() == [[1, 0], [2, 0.5], [3, 1], [4, 1.5]]
        file = io.BytesIO()
        df.to_parquet(file, index=False, compression="zstd", row_group_size_rows=2)
    assert pq.ParquetFile(io.BytesIO(file.getvalue())).num_row_groups == 2
    assert pq.read_table(io.BytesIO(file.getvalue()))["n"].to_pylist() == [0, 0.5, 1, 1.5]


def test_cudf__a_column_of_a_device_array_is_that_array() -> None:
    with standin.installed() as device:
        import cudf
        import cupy

        x = cupy.arange(1000)
        df = cudf.DataFrame({"x": x})
        df["x"].to_cupy()[0] = 7
        assert int(x[0]) == 7
        assert device.allocated == 8000


# ---- Memory -------------------------------------------------------------------------------------------


def test_device__memory_is_counted_once_and_freed() -> None:
    with standin.installed() as device:
        import cupy

        x = cupy.zeros(1000)
        view = x[10:].reshape(2, -1)
        assert device.allocated == 8000
        twice = x * 2
        assert device.allocated == 16_000
        del x, twice
        assert device.allocated == 8000, "the view holds it"
        del view
        assert (device.allocated, device.peak) == (0, 16_000)


def test_device__over_the_limit() -> None:
    with standin.installed(memory_limit=10_000) as device:
        import cudf
        import cupy
        import rmm
        from rmm.allocators.cupy import rmm_cupy_allocator

        x = cupy.zeros(1000)
        assert cupy.cuda.runtime.memGetInfo() == (2000, 10_000)
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="Out of memory allocating 8,000 bytes"):
            x + 1
        cupy.cuda.set_allocator(rmm_cupy_allocator)
        with pytest.raises(MemoryError, match="std::bad_alloc") as caught:
            x + 1
        assert not isinstance(caught.value, cupy.cuda.memory.OutOfMemoryError)
        with pytest.raises(MemoryError, match="std::bad_alloc"):
            cudf.Series(np.arange(1000))
        del x, caught
        gc.collect()
        cudf.Series(np.arange(1000))
        rmm.reinitialize(pool_allocator=True, initial_pool_size=2**20)
        assert rmm.mr.available_device_memory() == (10_000 - device.allocated, 10_000)


# ---- Kernels ------------------------------------------------------------------------------------------


# The simulator puts its own `cuda` into a kernel's globals, hence not a function inside the test.
KERNELS = """
from numba import cuda

@cuda.jit(device=True)
def plus(a, b):
    return a + b

@cuda.jit
def add(x, y, k):
    i = cuda.grid(1)
    if i < y.size:
        y[i] = plus(x[i], k)
"""


def test_kernel__takes_device_arrays_only() -> None:
    pytest.importorskip("numba_cuda")
    with standin.installed() as device:
        import cupy

        scope: dict[str, Any] = {}
        exec(KERNELS, scope)
        cuda, add = scope["cuda"], scope["add"]
        x = cupy.arange(6)
        y = cupy.zeros(3, cupy.int64)
        add[1, 4](x[::2], y, 3)
        assert y.get().tolist() == [3, 5, 7]
        assert device.calls["kernel add"] == 1
        for wrong, message in (
            (lambda: add[1, 4](np.arange(3), y, 3), "device arrays and numbers, not <class 'numpy.ndarray'>"),
            (lambda: add[1, 4](x, cuda.In(np.arange(3)), 3), "device arrays and numbers"),
            (lambda: add[1, 4]([1, 2], y, 3), "device arrays and numbers"),
        ):
            with pytest.raises(TypeError, match=message):
                wrong()
        with pytest.raises(ValueError, match="an empty launch"):
            add[0, 4](x, y, 3)
        with pytest.raises(ValueError, match="at most 1024"):
            add[1, 2048](x, y, 3)


# ---- K-means and clusters -----------------------------------------------------------------------------


def blobs() -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.concatenate([rng.normal(at, 0.3, (30, 2)) for at in (0, 5, 10)]).astype(np.float32)


def test_kmeans__from_given_centres() -> None:
    rows = blobs()
    with standin.installed():
        import cupy
        from cuml.cluster import KMeans

        start = rows[[0, 30, 60]]
        model = KMeans(n_clusters=3, init=start, n_init=1, max_iter=20).fit(cupy.asarray(rows))
        assert isinstance(model.cluster_centers_, cupy.ndarray)
        assert model.cluster_centers_.dtype == np.float32
        found = cupy.asnumpy(model.labels_)
        assert found.tolist() == [0] * 30 + [1] * 30 + [2] * 30
        np.testing.assert_allclose(
            model.cluster_centers_.get(), [rows[found == label].mean(axis=0) for label in range(3)], atol=1e-4
        )
        assert model.predict(cupy.asarray(start)).get().tolist() == [0, 1, 2]
        host = KMeans(n_clusters=3, init=cupy.asarray(start), n_init=1).fit(rows, sample_weight=np.ones(90))
        assert isinstance(host.labels_, np.ndarray)
        with pytest.raises(ValueError, match="does not match the number of clusters"):
            KMeans(n_clusters=2, init=start).fit(rows)


def block(part: int) -> Any:
    import cupy

    return cupy.asarray(blobs()[part * 45 : (part + 1) * 45])


def where_am_i(number: int) -> tuple[int, int, int]:
    import cudf
    import cupy

    return os.getpid(), int(cupy.arange(number).sum()), len(cudf.Series(cupy.arange(number)))


def test_dask__kmeans_and_workers_with_the_stand_in() -> None:
    import dask.array as da
    from dask import delayed

    with standin.installed():
        import cupy
        import dask_cuda
        from cuml.dask.cluster import KMeans
        from distributed import Client

        for options, error in (
            ({"jit_unspill": True}, TypeError),
            ({"threads_per_worker": 0}, ValueError),
            ({"processes": False}, ValueError),
        ):
            with pytest.raises(error):
                dask_cuda.LocalCUDACluster(**options)
        options = {"n_workers": 1, "rmm_pool_size": 0.9, "enable_cudf_spill": True, "dashboard_address": None}
        with dask_cuda.LocalCUDACluster(**options) as cluster, Client(cluster) as client:
            pid, total, rows = client.submit(where_am_i, 5).result()
            assert pid != os.getpid()
            assert (total, rows) == (10, 5)
            assert dask_cuda.LocalCUDACluster.asked[-1] == options
            lazy = [
                da.from_delayed(delayed(block)(part), (45, 2), meta=cupy.empty((0, 2), cupy.float32))
                for part in (0, 1)
            ]
            start = blobs()[[0, 30, 60]]
            model = KMeans(client=client, n_clusters=3, init=start).fit(da.concatenate(lazy))
            assert model.labels_.compute().get().tolist() == [0] * 30 + [1] * 30 + [2] * 30
            with pytest.raises(ValueError, match=r"init='k-means\+\+'"):
                KMeans(client=client, init="k-means++").fit(da.concatenate(lazy))
            with pytest.raises(TypeError, match=r"not a cupy\.ndarray"):
                KMeans(client=client, n_clusters=3).fit(da.from_array(blobs()))


# ---- Installed and gone -------------------------------------------------------------------------------


def test_installed__is_undone() -> None:
    assert "cupy" not in sys.modules
    with standin.installed() as device:
        import cudf
        import cupy
        import rmm

        assert (cudf.__version__, cupy.__version__) == ("26.10.2", "14.2.0")
        assert rmm.mr is sys.modules["rmm.mr"]
        cupy.arange(3).sum()
        assert device.calls["cupy.arange"] == 1
    assert not {"cudf", "cupy", "cupy.cuda", "rmm", "rmm.mr"} & set(sys.modules)
    with pytest.raises(ImportError):
        import cupy


def test_environment__gives_it_to_a_child() -> None:
    program = """
        import cupy
        assert int(cupy.arange(4).sum()) == 6
        try:
            cupy.zeros(100)
        except cupy.cuda.memory.OutOfMemoryError as error:
            print(type(error).__name__)
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | standin.environment(memory_limit=100),
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout == "OutOfMemoryError\n"
