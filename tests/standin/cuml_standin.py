# ruff: noqa: ARG002 - parameters are those of the real library
"""cuml.cluster.KMeans and cuml.dask.cluster.KMeans, computed by scikit-learn.

As in cuML a fit ends when the centres move by less than `tol` in all (scikit-learn scales that by the
variance).  Not as in cuML: a cluster that loses all its rows is put elsewhere by scikit-learn.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

from standin import cupy_standin as cupy
from standin.manifest import Room, mirror

_STRINGS = ("scalable-k-means++", "k-means||", "k-means++", "random")


def _rows(X: Any) -> np.ndarray:  # noqa: N803
    """Host copy of the rows of a fit; cuML takes arrays of either side, in float32 or float64."""
    host = _host(X)
    if host.ndim != 2:
        raise ValueError(f"Expected 2D array, got {host.ndim}D array instead")
    host = host if host.dtype in (np.float32, np.float64) else host.astype(np.float32)
    if not np.isfinite(host).all():
        raise ValueError("Input contains NaN or infinity")
    return host


@mirror("cuml.cluster.KMeans")
class KMeans:
    _multi_gpu = False

    def __init__(
        self, *, n_clusters: int = 8, max_iter: int = 300, tol: float = 1e-4, verbose: Any = False,
        random_state: int | None = None, init: Any = "scalable-k-means++", n_init: Any = "auto",
        oversampling_factor: float = 2.0, max_samples_per_batch: int = 1 << 15,
        device_buffer_samples: int = 0, init_size: int = 0, output_type: str | None = None,
    ) -> None:  # fmt: skip
        self.n_clusters, self.max_iter, self.tol, self.random_state = n_clusters, max_iter, tol, random_state
        self.init, self.n_init, self.oversampling_factor = init, n_init, oversampling_factor
        self.device_buffer_samples, self.output_type = device_buffer_samples, output_type

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:  # noqa: N803
        from sklearn.cluster import KMeans as OnHost

        rows = _rows(X)
        self._check(rows)
        model = OnHost(
            self.n_clusters,
            init=self._start(rows),
            n_init=self._starts(),
            max_iter=self.max_iter,
            # scikit-learn multiplies by the mean variance.
            tol=self.tol / max(float(rows.var(axis=0).mean()), np.finfo(float).tiny),
            random_state=self.random_state,
        )
        model.fit(rows, sample_weight=None if sample_weight is None else _host(sample_weight))
        self._on_device = isinstance(X, cupy.ndarray) or getattr(X, "_is_frame", False)
        self._model = model
        self._centers = self._output(model.cluster_centers_.astype(rows.dtype))
        self._labels = self._output(model.labels_.astype(np.int32))
        self.inertia_, self.n_iter_ = float(model.inertia_), int(model.n_iter_)
        return self

    @property
    def cluster_centers_(self) -> Any:
        return self._fitted("_centers")

    @property
    def labels_(self) -> Any:
        return self._fitted("_labels")

    def predict(self, X: Any) -> Any:  # noqa: N803
        rows = _rows(X)
        centers = _host(self._fitted("_centers")).astype(np.float64)
        distances = ((rows[:, None, :] - centers[None]) ** 2).sum(axis=2)
        return self._output(distances.argmin(axis=1).astype(np.int32))

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:  # noqa: N803
        return self.fit(X, y, sample_weight).labels_

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:  # noqa: N803
        return float(self._fitted("_model").score(_rows(X), sample_weight=sample_weight))

    def _check(self, rows: np.ndarray) -> None:
        if not isinstance(self.n_clusters, Integral) or self.n_clusters <= 0:
            raise ValueError(f"n_clusters={self.n_clusters} should be a positive integer.")
        if len(rows) < self.n_clusters:
            raise ValueError(f"n_samples={len(rows)} should be >= n_clusters={self.n_clusters}.")
        if isinstance(self.init, str) and self.init not in _STRINGS:
            raise ValueError(f"Unknown init={self.init!r}")

    def _start(self, rows: np.ndarray) -> Any:
        if isinstance(self.init, str):
            return "random" if self.init == "random" else "k-means++"
        start = _host(self.init)
        if start.shape != (self.n_clusters, rows.shape[1]):
            raise ValueError(
                f"The shape of the initial centers {start.shape} does not match the number of clusters "
                f"{self.n_clusters} or of features {rows.shape[1]}."
            )
        return start.astype(rows.dtype)

    def _starts(self) -> int:
        """Runs of a fit.  With given centres all runs are the same; cuML does them nevertheless."""
        if not isinstance(self.init, str):
            return 1
        if self.n_init == "auto":
            return 10 if self.init == "random" else 1
        return int(self.n_init)

    def _output(self, host: np.ndarray) -> Any:
        """On the side where the rows of the fit lay, unless `output_type` names one."""
        on_device = {None: self._on_device, "input": self._on_device, "cupy": True, "numpy": False}
        return cupy.wrap(host) if on_device[self.output_type] else host

    def _fitted(self, name: str) -> Any:
        try:
            return vars(self)[name]
        except KeyError:
            raise AttributeError("This KMeans instance is not fitted yet") from None


def _host(values: Any) -> np.ndarray:
    if getattr(values, "_is_frame", False):
        values = values.to_cupy()
    return values._host if isinstance(values, cupy.ndarray) else np.asarray(values)


@mirror("cuml.dask.cluster.KMeans")
class DaskKMeans:
    """Fits where the client is; the blocks must be device arrays, as those that cuML's workers take."""

    def __init__(
        self, *, client: Any = None, verbose: Any = False, n_clusters: int = 8, **kwargs: Any
    ) -> None:
        from distributed import default_client

        cupy.register_with_dask()
        self.client = client or default_client()
        self.kwargs = {"n_clusters": n_clusters, **kwargs}
        KMeans(**self.kwargs)  # an unknown keyword fails here; in reality on a worker

    def fit(self, X: Any, sample_weight: Any = None) -> DaskKMeans:  # noqa: N803
        init, oversampling = self.kwargs.get("init"), self.kwargs.get("oversampling_factor", 2.0)
        if isinstance(init, str) and (init == "k-means++" or oversampling == 0):
            raise ValueError("init='k-means++' or oversampling_factor=0 not supported for KMeansMG")
        blocks = self._blocks(X)
        weights = (
            None if sample_weight is None else cupy.functions["concatenate"](self._blocks(sample_weight))
        )
        self._model = KMeans(**self.kwargs).fit(cupy.functions["concatenate"](blocks), sample_weight=weights)
        self.cluster_centers_, self.inertia_ = self._model.cluster_centers_, self._model.inertia_
        self.labels_ = self._lazy(self._model.labels_, [len(block) for block in blocks])
        return self

    def predict(self, X: Any, delayed: bool = True) -> Any:  # noqa: N803
        blocks = self._blocks(X)
        labels = self._model.predict(cupy.functions["concatenate"](blocks))
        lazy = self._lazy(labels, [len(block) for block in blocks])
        return lazy if delayed else lazy.persist()

    def get_combined_model(self) -> KMeans:
        return self._model

    def _blocks(self, X: Any) -> list[cupy.ndarray]:  # noqa: N803
        if not hasattr(X, "to_delayed"):
            raise TypeError(f"cuml.dask takes Dask arrays of device blocks, not {type(X)}")
        blocks = self.client.gather(self.client.compute(list(np.ravel(X.to_delayed()))))
        for block in blocks:
            if not isinstance(block, cupy.ndarray):
                raise TypeError(f"a block of the Dask array is {type(block)}, not a cupy.ndarray")
        return blocks

    @staticmethod
    def _lazy(labels: cupy.ndarray, lengths: list[int]) -> Any:
        import dask.array as da
        from dask import delayed

        meta, stops = cupy.wrap(np.empty(0, labels.dtype)), np.cumsum(lengths)
        parts = [labels[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]
        return da.concatenate([da.from_delayed(delayed(part), (len(part),), meta=meta) for part in parts])


DaskKMeans.__name__ = "KMeans"

rooms: dict[str, Room] = {
    "cuml.cluster": Room("cuml.cluster", {"KMeans": KMeans}),
    "cuml.dask.cluster": Room("cuml.dask.cluster", {"KMeans": DaskKMeans}),
}
rooms["cuml.dask"] = Room("cuml.dask", {"cluster": rooms["cuml.dask.cluster"]})
rooms["cuml"] = Room("cuml", {"cluster": rooms["cuml.cluster"], "KMeans": KMeans})
