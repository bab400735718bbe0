# ruff: noqa: ARG002, ARG005 - parameters are those of the real library
"""cudf, computed by pandas and Arrow; `cudf_columns` has the columns.

What cuDF leaves open comes out in an awkward order: groups that are not sorted, and the rows of a join.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from standin import cudf_columns as col
from standin import cupy_standin as cupy
from standin.manifest import Room, lacks, mirror


def _host(value: Any) -> Any:
    """An operand as pandas takes it; host arrays stay outside."""
    if isinstance(value, _Frame):
        return value._data
    if isinstance(value, cupy.ndarray):
        return value._host if value.ndim else value._host[()]
    if isinstance(value, np.ndarray | pd.Series | pd.DataFrame | pd.Index):
        raise TypeError(f"Unsupported type {type(value)}: copy it to the device first")
    return value


def _column(data: Any, dtype: Any = None, nan_as_null: bool | None = None) -> pd.Series:
    """A column of anything a constructor takes.  As in cuDF a NaN from the host is null unless
    `nan_as_null` is False, one from the device is not unless it is True."""
    if isinstance(data, _Single):
        made = data._data
    elif isinstance(data, cupy.ndarray):
        if data.ndim != 1:
            raise ValueError("Data must be 1-dimensional")
        made = pd.Series(data._host, copy=False)
        made = col.nans_to_nulls(made) if nan_as_null else made
    elif isinstance(data, pa.Array | pa.ChunkedArray):
        made = col.normal(pd.Series(col.from_arrow(data)))
    elif isinstance(data, DataFrame | pd.DataFrame):
        raise TypeError(f"a column of {type(data)}")
    else:
        made = col.normal(data if isinstance(data, pd.Series) else pd.Series(data)).copy()
        made = made if nan_as_null is False else col.nans_to_nulls(made)
    return col.cast(made, dtype) if dtype is not None else made


# ---- What all frames have -----------------------------------------------------------------------------


class _Frame:
    """A pandas object that nobody gets at without asking."""

    __slots__ = ("__weakref__", "_data")
    __hash__ = None
    __array_ufunc__ = None
    _is_frame = True
    _data: Any

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a host NumPy array via __array__ is not allowed, To explicitly construct "
            "a GPU matrix, consider using .to_cupy()\nTo explicitly construct a host matrix, consider using "
            ".to_numpy()."
        )

    def __arrow_array__(self, type: Any = None) -> Any:  # noqa: A002
        raise TypeError("Implicit conversion to a host PyArrow object via __arrow_array__ is not allowed.")

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{func.__name__} of a cudf object")

    def __dataframe__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a host dataframe is not allowed.")

    def __bool__(self) -> bool:
        raise ValueError(f"The truth value of a {type(self).__name__} is ambiguous.")

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return repr(self._data)

    def __reduce__(self) -> Any:
        return wrap, (self._data,)


def wrap(data: Any, renumber: bool = False) -> Any:
    """What pandas gave, on the device; scalars as they are."""
    if isinstance(data, pd.MultiIndex):
        raise lacks("MultiIndex")
    if isinstance(data, pd.Index):
        return _made(Index, col.normal(data.to_series(index=pd.RangeIndex(len(data)))))
    if not isinstance(data, pd.Series | pd.DataFrame):
        return data
    if renumber:
        data = data.reset_index(drop=True)
    index = col.plain_index(data.index)
    if isinstance(data, pd.Series):
        return _made(Series, col.normal(data.set_axis(index)))
    made = {name: col.normal(data[name]) for name in data.columns}
    return _made(DataFrame, col.table_of(made, index))


def _made(cls: type, data: Any) -> Any:
    made = object.__new__(cls)
    made._data = data
    _adopt_all(made)
    return made


def _adopt_all(frame: _Frame) -> None:
    data = frame._data
    for column in [data] if isinstance(data, pd.Series) else [data[name] for name in data.columns]:
        col.adopt(frame, column)


def _index_of(index: Any) -> pd.Index | None:
    if index is None:
        return None
    return index._pandas() if isinstance(index, Index) else pd.Index(_column(index).array)


# ---- One column ---------------------------------------------------------------------------------------


class _Single(_Frame):
    """Series and Index."""

    __slots__ = ()

    def __iter__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} object is not iterable. Consider using `.to_arrow()`, `.to_pandas()` or "
            "`.to_numpy()` if you wish to iterate over the values."
        )

    def __contains__(self, item: Any) -> bool:
        raise lacks(f"`in` of a cudf.{type(self).__name__}")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if col.nulls(self._data).any():
            raise NotImplementedError("a column with nulls has a mask, which CuPy does not support")
        return col.to_device(self._data, None, None).__cuda_array_interface__


_SINGLE: dict[str, Any] = {
    "dtype": property(lambda self: col.dtype_of(self._data)),
    "shape": property(lambda self: (len(self._data),)),
    "size": property(lambda self: len(self._data)),
    "ndim": property(lambda self: 1),
    "empty": property(lambda self: not len(self._data)),
    "values": property(lambda self: col.to_device(self._data, None, None)),
    "hasnans": property(lambda self: bool((col.nulls(self._data) | col.nans(self._data)).any())),
    "is_unique": property(lambda self: bool(self._data.is_unique)),
    "is_monotonic_increasing": property(lambda self: bool(self._data.is_monotonic_increasing)),
    "is_monotonic_decreasing": property(lambda self: bool(self._data.is_monotonic_decreasing)),
}
"""Properties that a Series and an Index share."""


def to_cupy(self: Any, dtype: Any = None, copy: bool = False, na_value: Any = None) -> cupy.ndarray:
    made = col.to_device(self._data, dtype, na_value)
    return made.copy() if copy else made


def to_numpy(self: Any, dtype: Any = None, copy: bool = True, na_value: Any = None) -> np.ndarray:
    if not copy:
        raise ValueError(
            "copy=False is not supported because conversion to a numpy array always copies the data."
        )
    if col.dtype_of(self._data).kind in "biuf":
        return col.to_device(self._data, dtype, na_value).get()
    host = self._data.to_numpy(copy=True)
    return host if dtype is None else host.astype(dtype)


def to_arrow(self: Any) -> pa.Array:
    return col.arrow_of(self._data)


def tolist(self: Any) -> None:
    raise TypeError(
        "cuDF does not support conversion to host memory via the `tolist()` method. Consider using "
        "`.to_arrow().to_pylist()` to construct a Python list."
    )


def _missing(self: Any) -> np.ndarray:
    return col.nulls(self._data) | col.nans(self._data)


def isna(self: Any) -> Any:
    return wrap(pd.Series(_missing(self), getattr(self._data, "index", None), name=self._data.name))


def notna(self: Any) -> Any:
    return wrap(pd.Series(~_missing(self), getattr(self._data, "index", None), name=self._data.name))


def searchsorted(
    self: Any,
    values: Any,
    side: str = "left",
    sorter: Any = None,
    ascending: bool = True,
    na_position: str = "last",
) -> Any:
    if sorter is not None:
        raise NotImplementedError("sorter is currently not supported.")
    if not ascending or _missing(self).any():
        raise lacks("searchsorted of a descending column or of one with nulls")
    found = np.searchsorted(self._data.to_numpy(), _host(values), side=side)
    return int(found) if np.isscalar(values) else cupy.wrap(found.astype(np.int32))


_SINGLE |= {
    each.__name__: each for each in (to_cupy, to_numpy, to_arrow, tolist, isna, notna, searchsorted)
} | {"to_list": tolist, "isnull": isna, "notnull": notna}


def _shared(cls: type) -> type:
    """Class decorator: what a Series and an Index share."""
    for name, member in _SINGLE.items():
        setattr(cls, name, member)
    return cls


def _operator(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    def method(self: _Frame, other: Any) -> Any:
        left, right = self._data, _host(other)
        with np.errstate(all="ignore"):
            return wrap(function(right, left) if swapped else function(left, right))

    return method


def _operators() -> dict[str, Any]:
    arithmetic = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
    made: dict[str, Any] = {}
    for name in arithmetic:
        function, plain = getattr(operator, name), name.rstrip("_")
        made |= {f"__{plain}__": _operator(function), f"__r{plain}__": _operator(function, swapped=True)}
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        made[f"__{name}__"] = _operator(getattr(operator, name))
    made["__invert__"] = lambda self: wrap(~self._data)
    made["__neg__"] = lambda self: wrap(-self._data)
    made["__abs__"] = lambda self: wrap(abs(self._data))
    return made


def _reduction(name: str) -> Callable[..., Any]:
    """A reduction to a host scalar, as cuDF's; nulls and NaN are left out."""

    def method(
        self: Any, axis: Any = None, skipna: bool = True, numeric_only: bool = False, **kwargs: Any
    ) -> Any:
        if kwargs.keys() - {"ddof", "min_count"}:
            raise lacks(f"{sorted(kwargs)} of {name}")
        if axis not in (None, 0, "index"):
            raise lacks(f"axis={axis} of {name}")
        if isinstance(self._data, pd.DataFrame):
            results = {column: _reduced(self._data[column], name, skipna, kwargs) for column in self._data}
            return wrap(pd.Series(results))
        return _reduced(self._data, name, skipna, kwargs)

    method.__name__ = name
    return method


def _reduced(data: pd.Series, name: str, skipna: bool, options: Mapping[str, Any]) -> Any:
    missing = col.nulls(data) | col.nans(data)
    if missing.any() and not skipna:
        return pd.NA if col.nulls(data).any() else np.nan
    kept = data[~missing]
    if (parts := col.parts_of(kept.array)) is not None:
        kept = pd.Series(parts[0])
    with np.errstate(all="ignore"):
        result = getattr(kept, name)(**options)
    if name in ("min", "max", "mean", "std", "var", "median") and not len(kept):
        return np.nan
    return result


_REDUCTIONS = {
    name: _reduction(name) for name in ("sum", "min", "max", "mean", "std", "var", "median", "prod")
}
_REDUCTIONS["product"] = _REDUCTIONS["prod"]


class _Located:
    """`loc` and `iloc`."""

    def __init__(self, data: Any, name: str) -> None:
        self._located, self._name = getattr(data, name), name

    def __getitem__(self, key: Any) -> Any:
        parts = tuple(map(_key, key)) if isinstance(key, tuple) else _key(key)
        return wrap(self._located[parts])

    def __setitem__(self, key: Any, value: Any) -> None:
        raise lacks(f"assignment by {self._name}")


def _key(key: Any) -> Any:
    """An indexer as pandas takes it; a null in a mask is False."""
    if isinstance(key, Series | cupy.ndarray | Index):
        data = key._data if isinstance(key, _Frame) else pd.Series(key._host)
        if col.dtype_of(data).kind == "b":
            return np.where(col.nulls(data), False, col.parts_of(col.nullable(data).array)[0])
        return data.to_numpy()
    return _host(key) if not isinstance(key, slice | list | np.ndarray) else key


@mirror("cudf.core.accessors.lists.ListMethods", "cudf.Series.list")
class ListMethods:
    def __init__(self, parent: Series) -> None:
        self._parent = parent
        if not isinstance(parent.dtype, col.ListDtype):
            raise AttributeError("Can only use .list accessor with a 'list' dtype")

    @property
    def _lists(self) -> pa.Array:
        return col.arrow_of(self._parent._data)

    @property
    def leaves(self) -> Series:
        flat = self._lists.flatten()
        while pa.types.is_list(flat.type):
            flat = flat.flatten()
        return wrap(pd.Series(col.from_arrow(flat)))

    def len(self) -> Series:
        return self._result(pc.list_value_length(self._lists).cast(pa.int32()))

    def get(self, index: int, default: Any = None) -> Series:
        if not isinstance(index, int):
            raise lacks("cudf.Series.list.get of a sequence of indices")
        items = [
            None if row is None else row[index] if -len(row) <= index < len(row) else default
            for row in self._lists.to_pylist()
        ]
        return self._result(pa.array(items, self._lists.type.value_type))

    def _result(self, array: pa.Array) -> Series:
        return wrap(pd.Series(col.from_arrow(array), self._parent._data.index, name=self._parent._data.name))


@mirror("cudf.Series")
@_shared
class Series(_Single):
    __slots__ = ()
    locals().update(_operators())
    locals().update(_REDUCTIONS)

    def __init__(
        self, data: Any = None, index: Any = None, dtype: Any = None, name: Any = None, copy: bool = False,
        nan_as_null: bool | None = None,
    ) -> None:  # fmt: skip
        made = _column([] if data is None else data, dtype, nan_as_null)
        name = name if name is not None else getattr(data, "name", None)
        kept = made.index if index is None else _index_of(index)
        self._data = pd.Series(made.array, kept, name=name, copy=copy)
        _adopt_all(self)

    @classmethod
    def from_arrow(cls, array: Any) -> Series:
        return wrap(pd.Series(col.from_arrow(array)))

    name = property(lambda self: self._data.name, lambda self, name: setattr(self._data, "name", name))
    index = property(lambda self: wrap(self._data.index), lambda self, index: _set_index(self, index))
    list = property(lambda self: ListMethods(self))
    loc = property(lambda self: _Located(self._data, "loc"))
    iloc = property(lambda self: _Located(self._data, "iloc"))
    has_nulls = property(lambda self: bool(col.nulls(self._data).any()))
    null_count = property(lambda self: int(col.nulls(self._data).sum()))
    valid_count = property(lambda self: len(self._data) - self.null_count)

    def __getitem__(self, key: Any) -> Any:
        return wrap(self._data[_key(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._data = self._data.copy()
        self._data[_key(key)] = _host(value)
        self._data = col.normal(self._data)
        _adopt_all(self)

    def to_pandas(self, *, index: bool = True, nullable: bool = False, arrow_type: bool = False) -> pd.Series:
        if nullable or arrow_type:
            raise lacks("cudf.Series.to_pandas with nullable or Arrow's types")
        return col.to_host(self._data)

    def to_frame(self, name: Any = None) -> DataFrame:
        return wrap(self._data.to_frame(*([] if name is None else [name])))

    def astype(self, dtype: Any, copy: bool | None = None, errors: str = "raise") -> Series:
        return wrap(col.cast(self._data, dtype))

    def copy(self, deep: bool = True) -> Series:
        return wrap(self._data.copy(deep=deep))

    def fillna(self, value: Any) -> Series:
        return wrap(col.filled(self._data, _host(value)))

    def nans_to_nulls(self) -> Series:
        return wrap(col.nans_to_nulls(self._data))

    def dropna(
        self, axis: Any = 0, inplace: bool = False, how: Any = None, ignore_index: bool = False
    ) -> Any:
        kept = self._data[~_missing(self)]
        return wrap(kept.reset_index(drop=True) if ignore_index else kept)

    def sort_values(
        self, axis: Any = 0, ascending: bool = True, inplace: bool = False, kind: str = "quicksort",
        na_position: str = "last", ignore_index: bool = False,
    ) -> Series:  # fmt: skip
        _no_kind(kind, inplace)
        return wrap(
            self._data.sort_values(
                ascending=ascending, kind="stable", na_position=na_position, ignore_index=ignore_index
            )
        )

    def argsort(
        self, axis: Any = 0, kind: str = "quicksort", order: Any = None, ascending: bool = True,
        na_position: str = "last",
    ) -> Series:  # fmt: skip
        _no_kind(kind, inplace=False)
        numbered = self._data.reset_index(drop=True)
        sorted_ = numbered.sort_values(ascending=ascending, kind="stable", na_position=na_position)
        return wrap(pd.Series(sorted_.index.to_numpy().astype(np.int32)))

    def reset_index(
        self, level: Any = None, drop: bool = False, name: Any = None, inplace: bool = False
    ) -> Any:
        if inplace:
            raise lacks("cudf.Series.reset_index(inplace=True)")
        return wrap(self._data.reset_index(drop=drop, **({} if name is None or drop else {"name": name})))

    def rename(self, index: Any = None) -> Series:
        return wrap(self._data.rename(index))

    def head(self, n: int = 5) -> Series:
        return wrap(self._data.head(n))

    def tail(self, n: int = 5) -> Series:
        return wrap(self._data.tail(n))

    def take(self, indices: Any, axis: Any = 0) -> Series:
        return wrap(self._data.iloc[_key(indices)])

    def unique(self) -> Series:
        return wrap(self._data.drop_duplicates(), renumber=True)

    def nunique(self, dropna: bool = True) -> int:
        return int(col.nans_to_nulls(self._data).nunique(dropna))

    def count(self) -> int:
        return int((~_missing(self)).sum())

    def drop_duplicates(
        self, keep: Any = "first", inplace: bool = False, ignore_index: bool = False
    ) -> Series:
        if inplace:
            raise lacks("cudf.Series.drop_duplicates(inplace=True)")
        return wrap(self._data.drop_duplicates(keep=keep, ignore_index=ignore_index))

    def duplicated(self, keep: Any = "first") -> Series:
        return wrap(self._data.duplicated(keep))

    def isin(self, values: Any) -> Series:
        values = values._data if isinstance(values, _Frame) else _host(values)
        return wrap(self._data.isin(values).astype(bool))

    def between(self, left: Any, right: Any, inclusive: str = "both") -> Series:
        return wrap(self._data.between(_host(left), _host(right), inclusive))

    def where(self, cond: Any, other: Any = None, inplace: bool = False) -> Series:
        return wrap(col.nullable(self._data).where(pd.Series(_key(cond), self._data.index), _other(other)))

    def mask(self, cond: Any, other: Any = None, inplace: bool = False) -> Series:
        return wrap(col.nullable(self._data).mask(pd.Series(_key(cond), self._data.index), _other(other)))

    def clip(self, lower: Any = None, upper: Any = None, axis: Any = 1, inplace: bool = False) -> Series:
        return wrap(self._data.clip(_host(lower), _host(upper)))

    def abs(self) -> Series:
        return wrap(self._data.abs())

    def round(self, decimals: int = 0, how: str = "half_even") -> Series:
        if how != "half_even":
            raise lacks("round(how='half_up')")
        return wrap(self._data.round(decimals))

    def any(self, axis: Any = 0, bool_only: Any = None, skipna: bool = True) -> bool:
        return bool(_reduced(self._data, "any", skipna, {}))

    def all(self, axis: Any = 0, bool_only: Any = None, skipna: bool = True) -> bool:
        return bool(_reduced(self._data, "all", skipna, {}))

    def quantile(self, q: Any = 0.5, interpolation: str = "linear", exact: bool = True) -> Any:
        if not exact:
            raise lacks("cudf.Series.quantile(exact=False)")
        kept = pd.Series(self._data[~_missing(self)].to_numpy(col.dtype_of(self._data)))
        return wrap(kept.quantile(q, interpolation))

    def cumsum(self, axis: Any = None, skipna: bool = True) -> Series:
        return wrap(self._data.cumsum())

    def cummax(self, axis: Any = None, skipna: bool = True) -> Series:
        return wrap(self._data.cummax())

    def cummin(self, axis: Any = None, skipna: bool = True) -> Series:
        return wrap(self._data.cummin())

    def shift(self, periods: int = 1, freq: Any = None, axis: Any = 0, fill_value: Any = None) -> Series:
        return wrap(
            col.nullable(self._data).shift(periods, fill_value=pd.NA if fill_value is None else fill_value)
        )

    def diff(self, periods: int = 1) -> Series:
        return wrap(col.nullable(self._data).diff(periods))

    def value_counts(
        self, normalize: bool = False, sort: bool = True, ascending: bool = False, dropna: bool = True
    ) -> Series:
        counts = self._data.value_counts(normalize, sort, ascending, dropna=dropna)
        return wrap(counts if sort else counts[::-1])

    def groupby(
        self, by: Any = None, axis: Any = 0, level: Any = None, as_index: bool = True, sort: bool = False,
        group_keys: bool = False, observed: bool = True, dropna: bool = True,
    ) -> SeriesGroupBy:  # fmt: skip
        if not isinstance(by, Series) or level is not None:
            raise lacks("cudf.Series.groupby by anything but a Series")
        return SeriesGroupBy(self, by, sort=sort, dropna=dropna)

    def equals(self, other: Any) -> bool:
        return isinstance(other, Series) and self._data.equals(other._data)

    def memory_usage(self, index: bool = True, deep: bool = False) -> int:
        return int(self._data.memory_usage(index=index, deep=deep))

    isnull, notnull, to_list = isna, notna, tolist


def _set_index(frame: Any, index: Any) -> None:
    frame._data = frame._data.set_axis(_index_of(index), axis=0)


def _other(value: Any) -> Any:
    return pd.NA if value is None else _host(value)


def _no_kind(kind: str, inplace: bool) -> None:
    if kind not in ("quicksort", "stable"):
        raise TypeError(f"kind={kind!r}: cuDF's sorts are stable; it only warns")
    if inplace:
        raise lacks("sorting in place")


@mirror("cudf.Index")
@_shared
class Index(_Single):
    __slots__ = ()
    locals().update({name: each for name, each in _operators().items() if name not in ("__neg__", "__abs__")})

    def __init__(
        self, data: Any = None, dtype: Any = None, copy: bool = False, name: Any = None,
        tupleize_cols: bool = True, nan_as_null: bool | None = None,
    ) -> None:  # fmt: skip
        made = _column([] if data is None else data, dtype, nan_as_null)
        self._data = pd.Series(made.array, name=name)
        _adopt_all(self)

    name = property(lambda self: self._data.name, lambda self, name: setattr(self._data, "name", name))

    def _pandas(self) -> pd.Index:
        return pd.Index(col.to_host(self._data))

    def __getitem__(self, key: Any) -> Any:
        found = self._data.iloc[_key(key)]
        return (
            _made(Index, col.normal(found.reset_index(drop=True))) if isinstance(found, pd.Series) else found
        )

    def to_pandas(self, *, nullable: bool = False, arrow_type: bool = False) -> pd.Index:
        return self._pandas()

    def to_series(self, index: Any = None, name: Any = None) -> Series:
        return wrap(self._data.rename(name) if name is not None else self._data)

    def min(self, axis: Any = None, skipna: bool = True, numeric_only: bool = False) -> Any:
        return _reduced(self._data, "min", skipna, {})

    def max(self, axis: Any = None, skipna: bool = True, numeric_only: bool = False) -> Any:
        return _reduced(self._data, "max", skipna, {})


# ---- Tables -------------------------------------------------------------------------------------------


@mirror("cudf.DataFrame")
class DataFrame(_Frame):
    __slots__ = ()
    locals().update(_operators())
    locals().update(_REDUCTIONS)

    def __init__(
        self, data: Any = None, index: Any = None, columns: Any = None, dtype: Any = None, copy: bool = True,
        nan_as_null: bool | None = None,
    ) -> None:  # fmt: skip
        self._data = _table(data, _index_of(index), columns, dtype, nan_as_null)
        _adopt_all(self)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> DataFrame:
        if not isinstance(table, pa.Table):
            raise TypeError(f"pyarrow.Table is expected, not {type(table)}")
        return _of_table(table)

    columns = property(
        lambda self: self._data.columns.copy(),
        lambda self, names: setattr(self._data, "columns", list(names)),
    )
    index = property(lambda self: wrap(self._data.index), lambda self, index: _set_index(self, index))
    dtypes = property(
        lambda self: pd.Series({name: col.dtype_of(self._data[name]) for name in self._data}, dtype=object)
    )
    shape = property(lambda self: self._data.shape)
    size = property(lambda self: self._data.size)
    ndim = property(lambda self: 2)
    empty = property(lambda self: self._data.empty)
    loc = property(lambda self: _Located(self._data, "loc"))
    iloc = property(lambda self: _Located(self._data, "iloc"))
    values = property(lambda self: _matrix(self._data, None, None))

    def __iter__(self) -> Any:
        return iter(self._data.columns)

    def __contains__(self, name: Any) -> bool:
        return name in self._data.columns

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, DataFrame):
            raise lacks("a DataFrame as mask")
        if isinstance(key, Series | cupy.ndarray):
            return wrap(self._data[_key(key)] if _is_mask(key) else self._data.iloc[_key(key)])
        return wrap(self._data[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int):
            raise lacks("assignment to anything but one column")
        data = self._data.copy(deep=False)
        if isinstance(value, np.ndarray):
            value = pd.Series(value)
        if np.isscalar(value) or value is None:
            data[key] = _column([value] * len(data) if len(data) else []).array
        else:
            column = _column(value)
            if isinstance(value, Series):
                column = col.normal(col.nullable(column).reindex(data.index)) if len(data.columns) else column
            elif len(data.columns) and len(column) != len(data):
                raise ValueError(
                    f"Length of values ({len(column)}) does not match length of index ({len(data)})"
                )
            data[key] = column.array
        self._data = data
        _adopt_all(self)

    def __delitem__(self, key: Any) -> None:
        self._data = self._data.drop(columns=key)

    def pop(self, item: Any) -> Series:
        found = self[item]
        del self[item]
        return found

    def insert(self, loc: int, column: Any, value: Any, allow_duplicates: bool = False) -> None:
        names = list(self._data.columns)
        if column in names:
            raise NameError(f"duplicated column name {column}")
        self[column] = value
        names.insert(loc, column)
        self._data = self._data[names]

    def keys(self) -> Any:
        return self._data.columns

    def items(self) -> Any:
        return ((name, wrap(self._data[name])) for name in self._data.columns)

    def assign(self, **kwargs: Any) -> DataFrame:
        made = self.copy(deep=False)
        for name, value in kwargs.items():
            made[name] = value(made) if callable(value) else value
        return made

    def to_pandas(self, *, nullable: bool = False, arrow_type: bool = False) -> pd.DataFrame:
        if nullable or arrow_type:
            raise lacks("cudf.DataFrame.to_pandas with nullable or Arrow's types")
        made = {name: col.to_host(self._data[name]) for name in self._data.columns}
        return pd.DataFrame(made, index=self._data.index)

    def to_arrow(self, preserve_index: bool | None = None) -> pa.Table:
        if preserve_index:
            raise lacks("cudf.DataFrame.to_arrow(preserve_index=True)")
        return pa.table({name: col.arrow_of(self._data[name]) for name in self._data.columns})

    def to_cupy(self, dtype: Any = None, copy: bool = False, na_value: Any = None) -> cupy.ndarray:
        return _matrix(self._data, dtype, na_value)

    def to_numpy(self, dtype: Any = None, copy: bool = True, na_value: Any = None) -> np.ndarray:
        return _matrix(self._data, dtype, na_value).get()

    def to_parquet(
        self, path: Any, engine: str = "cudf", compression: str | None = "snappy", index: bool | None = None,
        statistics: str = "ROWGROUP", row_group_size_bytes: int | None = None,
        row_group_size_rows: int | None = None, max_page_size_bytes: int | None = None,
        max_page_size_rows: int | None = None, use_dictionary: bool = True, header_version: str = "1.0",
    ) -> None:  # fmt: skip
        if engine != "cudf" or index:
            raise lacks(f"cudf.DataFrame.to_parquet(engine={engine!r}, index={index})")
        if index is None and not isinstance(self._data.index, pd.RangeIndex):
            raise lacks("cudf.DataFrame.to_parquet of an index (index=False leaves it out)")
        if (compression or "none").lower() not in ("none", "snappy", "zstd", "lz4", "gzip"):
            raise ValueError(f"Unsupported `compression` type {compression}")
        table = self.to_arrow()
        pq.write_table(
            table,
            path,
            compression=compression or "none",
            row_group_size=row_group_size_rows,
            use_dictionary=use_dictionary,
        )

    def copy(self, deep: bool = True) -> DataFrame:
        return wrap(self._data.copy(deep=deep))

    def astype(self, dtype: Any, copy: bool | None = None, errors: str = "raise") -> DataFrame:
        wanted = dtype if isinstance(dtype, Mapping) else dict.fromkeys(self._data.columns, dtype)
        return self._each(lambda name, data: col.cast(data, wanted[name]) if name in wanted else data)

    def fillna(self, value: Any) -> DataFrame:
        fills = value if isinstance(value, Mapping) else dict.fromkeys(self._data.columns, value)
        return self._each(lambda name, data: col.filled(data, _host(fills[name])) if name in fills else data)

    def isna(self) -> DataFrame:
        return self._each(lambda name, data: pd.Series(col.nulls(data) | col.nans(data), data.index))

    def notna(self) -> DataFrame:
        return self._each(lambda name, data: pd.Series(~(col.nulls(data) | col.nans(data)), data.index))

    def nans_to_nulls(self) -> DataFrame:
        return self._each(lambda name, data: col.nans_to_nulls(data))

    def dropna(
        self, axis: Any = 0, how: str = "any", thresh: Any = None, subset: Any = None, inplace: bool = False,
        ignore_index: bool = False,
    ) -> DataFrame:  # fmt: skip
        if axis not in (0, "index") or thresh is not None or inplace:
            raise lacks("cudf.DataFrame.dropna with axis, thresh or inplace")
        asked = self._data[list(self._data.columns if subset is None else np.atleast_1d(subset))]
        missing = np.column_stack([col.nulls(asked[name]) | col.nans(asked[name]) for name in asked])
        kept = self._data[~(missing.any(axis=1) if how == "any" else missing.all(axis=1))]
        return wrap(kept.reset_index(drop=True) if ignore_index else kept)

    def sort_values(
        self, by: Any, axis: Any = 0, ascending: Any = True, inplace: bool = False, kind: str = "quicksort",
        na_position: str = "last", ignore_index: bool = False,
    ) -> DataFrame:  # fmt: skip
        _no_kind(kind, inplace)
        return wrap(
            self._data.sort_values(
                by, ascending=ascending, kind="stable", na_position=na_position, ignore_index=ignore_index
            )
        )

    def sort_index(self, axis: Any = 0, level: Any = None, ascending: bool = True) -> DataFrame:
        return wrap(self._data.sort_index(ascending=ascending, kind="stable"))

    def argsort(
        self, by: Any = None, axis: Any = 0, kind: str = "quicksort", order: Any = None,
        ascending: Any = True, na_position: str = "last",
    ) -> cupy.ndarray:  # fmt: skip
        _no_kind(kind, inplace=False)
        names = list(self._data.columns) if by is None else by
        numbered = self._data.reset_index(drop=True)
        order_ = numbered.sort_values(
            names, ascending=ascending, kind="stable", na_position=na_position
        ).index
        return cupy.wrap(order_.to_numpy().astype(np.int32))

    def merge(
        self, right: DataFrame, how: str = "inner", on: Any = None, left_on: Any = None, right_on: Any = None,
        left_index: bool = False, right_index: bool = False, sort: bool = False,
        suffixes: Sequence[str] = ("_x", "_y"), indicator: bool = False, validate: Any = None,
    ) -> DataFrame:  # fmt: skip
        if indicator:
            raise NotImplementedError("Only indicator=False is currently supported")
        if left_index or right_index or validate is not None:
            raise lacks("cudf.DataFrame.merge with left_index, right_index or validate")
        if not isinstance(right, DataFrame):
            raise TypeError(f"right must be a cudf.DataFrame, not {type(right)}")
        sides = [_nullable_table(side._data) for side in (self, right)]
        joined = sides[0].merge(
            sides[1],
            how=how,
            on=on,
            left_on=left_on,
            right_on=right_on,
            sort=sort,
            suffixes=tuple(suffixes),
        )
        # A hash join keeps no order.
        return wrap(joined if sort else joined[::-1].reset_index(drop=True))

    def groupby(
        self, by: Any = None, axis: Any = 0, level: Any = None, as_index: bool = True, sort: bool = False,
        group_keys: bool = False, observed: bool = True, dropna: bool = True,
    ) -> DataFrameGroupBy:  # fmt: skip
        if level is not None or by is None:
            raise lacks("cudf.DataFrame.groupby(level=...)")
        return DataFrameGroupBy(self, by, sort=sort, as_index=as_index, dropna=dropna)

    def drop(
        self, labels: Any = None, axis: Any = 0, index: Any = None, columns: Any = None, level: Any = None,
        inplace: bool = False, errors: str = "raise",
    ) -> DataFrame:  # fmt: skip
        if inplace or level is not None:
            raise lacks("cudf.DataFrame.drop(inplace=True)")
        return wrap(self._data.drop(labels, axis=axis, index=index, columns=columns, errors=errors))

    def rename(
        self, mapper: Any = None, index: Any = None, columns: Any = None, axis: Any = 0, copy: bool = True
    ) -> DataFrame:
        return wrap(self._data.rename(mapper, index=index, columns=columns, axis=None if columns else axis))

    def reset_index(self, level: Any = None, drop: bool = False, inplace: bool = False) -> DataFrame:
        if inplace:
            raise lacks("cudf.DataFrame.reset_index(inplace=True)")
        return wrap(self._data.reset_index(level, drop=drop))

    def set_index(self, keys: Any, drop: bool = True) -> DataFrame:
        return wrap(self._data.set_index(keys, drop=drop))

    def drop_duplicates(
        self, subset: Any = None, keep: Any = "first", inplace: bool = False, ignore_index: bool = False
    ) -> DataFrame:
        if inplace:
            raise lacks("cudf.DataFrame.drop_duplicates(inplace=True)")
        return wrap(self._data.drop_duplicates(subset, keep=keep, ignore_index=ignore_index))

    def duplicated(self, subset: Any = None, keep: Any = "first") -> Series:
        return wrap(self._data.duplicated(subset, keep))

    def head(self, n: int = 5) -> DataFrame:
        return wrap(self._data.head(n))

    def tail(self, n: int = 5) -> DataFrame:
        return wrap(self._data.tail(n))

    def take(self, indices: Any, axis: Any = 0) -> DataFrame:
        return wrap(self._data.iloc[_key(indices)])

    def count(self, axis: Any = 0, numeric_only: bool = False) -> Series:
        return wrap(pd.Series({name: wrap(self._data[name]).count() for name in self._data}))

    def equals(self, other: Any) -> bool:
        return isinstance(other, DataFrame) and self._data.equals(other._data)

    def memory_usage(self, index: bool = True, deep: bool = False) -> Series:
        return wrap(self._data.memory_usage(index, deep))

    def _each(self, function: Callable[[Any, pd.Series], pd.Series]) -> DataFrame:
        made = {name: function(name, self._data[name]) for name in self._data.columns}
        return wrap(col.table_of(made, self._data.index))

    isnull, notnull = isna, notna


def _nullable_table(data: pd.DataFrame) -> pd.DataFrame:
    return col.table_of({name: col.nullable(data[name]) for name in data.columns}, data.index)


def _is_mask(key: Any) -> bool:
    return key.dtype.kind == "b"


def _matrix(data: pd.DataFrame, dtype: Any, na_value: Any) -> cupy.ndarray:
    if data.columns.empty:
        return cupy.wrap(np.empty((len(data), 0)))
    columns = [col.to_device(data[name], dtype, na_value)._host for name in data.columns]
    # Columns lie apart, as in cuDF.
    return cupy.wrap(np.asfortranarray(np.column_stack(columns)))


def _table(data: Any, index: Any, columns: Any, dtype: Any, nan_as_null: bool | None) -> pd.DataFrame:
    """The columns that the constructor of a DataFrame is given."""
    if isinstance(data, DataFrame):
        data = {name: wrap(data._data[name]) for name in data._data.columns}
    elif isinstance(data, pd.DataFrame):
        index = data.index if index is None else index
        data = {name: data[name] for name in data.columns}
    elif isinstance(data, cupy.ndarray | np.ndarray) and data.ndim == 2:
        names = range(data.shape[1]) if columns is None else columns
        data, columns = {name: data[:, place] for place, name in enumerate(names)}, None
    elif data is not None and not isinstance(data, Mapping):
        raise lacks(f"a DataFrame of {type(data)}")
    made = {name: _column(value, dtype, nan_as_null) for name, value in (data or {}).items()}
    if columns is not None:
        made = {name: made[name] for name in columns}
    lengths = {len(column) for column in made.values()}
    if len(lengths) > 1:
        raise ValueError(f"All columns must be of equal length, not {sorted(lengths)}")
    if index is None and made:
        index = next(iter(made.values())).index
    return col.table_of(made, index)


def _of_table(table: pa.Table) -> DataFrame:
    made = {name: col.normal(pd.Series(col.from_arrow(table[name]))) for name in table.column_names}
    return wrap(col.table_of(made, pd.RangeIndex(table.num_rows)))


# ---- Groups -------------------------------------------------------------------------------------------

_AGGREGATIONS = (
    "sum",
    "min",
    "max",
    "mean",
    "first",
    "last",
    "std",
    "var",
    "median",
    "prod",
    "nunique",
    "count",
)


class _Groups:
    """Groups of rows; those that are not sorted come in reverse order of appearance."""

    _grouped: Any
    _sort: bool

    def _result(self, result: Any) -> Any:
        if self._sort:
            return wrap(result)
        reverse = result[::-1]
        return wrap(reverse if self._as_index else reverse.reset_index(drop=True))

    _as_index = True


def _aggregation(name: str) -> Callable[..., Any]:
    def method(self: _Groups, *args: Any, **kwargs: Any) -> Any:
        if args or set(kwargs) - {"ddof", "min_count"}:
            raise lacks(f"arguments of groupby().{name}()")
        return self._result(getattr(self._grouped, name)(**kwargs))

    method.__name__ = name
    return method


def _per_row(name: str) -> Callable[..., Any]:
    """What has a value for every row keeps their order."""

    def method(self: _Groups, *args: Any, **kwargs: Any) -> Any:
        return wrap(getattr(self._grouped, name)(*args, **kwargs))

    method.__name__ = name
    return method


def agg(self: _Groups, func: Any = None, *args: Any, **kwargs: Any) -> Any:
    names = [each for value in [*np.atleast_1d(func)] for each in _names(value)] if func is not None else []
    names += [value[1] for value in kwargs.values() if isinstance(value, tuple)]
    if args or not all(isinstance(name, str) and name in (*_AGGREGATIONS, "size") for name in names):
        raise lacks(f"groupby().agg({func!r})")
    return self._result(self._grouped.agg(*([] if func is None else [func]), **kwargs))


def _names(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [each for part in value.values() for each in _names(part)]
    return list(value) if isinstance(value, list) else [value]


def size(self: _Groups) -> Any:
    return self._result(self._grouped.size())


def nth(self: _Groups, n: Any, dropna: Any = None) -> Any:
    return wrap(self._grouped.nth(n))


_GROUPS: dict[str, Any] = {
    **{name: _aggregation(name) for name in _AGGREGATIONS},
    **{name: _per_row(name) for name in ("cumsum", "cummin", "cummax", "cumcount", "shift", "diff")},
    "head": _per_row("head"),
    "tail": _per_row("tail"),
    "agg": agg,
    "aggregate": agg,
    "size": size,
    "nth": nth,
    "ngroups": property(lambda self: self._grouped.ngroups),
}


@mirror("cudf.core.groupby.groupby.DataFrameGroupBy", "cudf.DataFrame.groupby()")
class DataFrameGroupBy(_Groups):
    locals().update(_GROUPS)

    def __init__(
        self, obj: DataFrame, by: Any = None, level: Any = None, sort: bool = False, as_index: bool = True,
        dropna: bool = True, group_keys: bool = False,
    ) -> None:  # fmt: skip
        keys = by._data if isinstance(by, Series) else by
        if not isinstance(keys, pd.Series | str | list):
            raise lacks(f"groups by {type(by)}")
        table = _nullable_table(obj._data)
        self._sort, self._as_index = sort, as_index
        self._grouped = table.groupby(keys, sort=sort, as_index=as_index, dropna=dropna)

    def __getitem__(self, key: Any) -> Any:
        made = object.__new__(SeriesGroupBy if isinstance(key, str) else DataFrameGroupBy)
        made._sort, made._as_index, made._grouped = self._sort, self._as_index, self._grouped[key]
        return made


@mirror("cudf.core.groupby.groupby.SeriesGroupBy", "cudf.Series.groupby()")
class SeriesGroupBy(_Groups):
    locals().update(_GROUPS)

    def __init__(
        self, obj: Series, by: Any = None, level: Any = None, sort: bool = False, as_index: bool = True,
        dropna: bool = True, group_keys: bool = False,
    ) -> None:  # fmt: skip
        self._sort = sort
        self._grouped = col.nullable(obj._data).groupby(by._data, sort=sort, dropna=dropna)


# ---- Windows ------------------------------------------------------------------------------------------


def _windowed(name: str) -> Callable[..., Any]:
    def method(self: Rolling, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            raise NotImplementedError("arguments of rolling aggregations are not supported")
        return wrap(getattr(self._windows, name)())

    method.__name__ = name
    return method


@mirror("cudf.core.window.rolling.Rolling", "cudf.Series.rolling()")
class Rolling:
    locals().update({name: _windowed(name) for name in ("sum", "min", "max", "mean", "count", "std", "var")})

    def __init__(
        self, obj: Series, window: int, min_periods: int | None = None, center: bool = False,
        win_type: str | None = None, on: Any = None, axis: Any = 0, closed: str | None = None,
        step: int | None = None, method: str = "single",
    ) -> None:  # fmt: skip
        unsupported = {"on": on, "step": step, "axis": axis or None}
        unsupported |= {"win_type": win_type not in (None, "boxcar"), "method": method != "single"}
        unsupported["closed"] = closed not in (None, "right")
        for name, asked in unsupported.items():
            if asked:
                raise NotImplementedError(f"{name} is currently not supported")
        if not isinstance(window, int):
            raise lacks("windows that are not a number of rows")
        self._windows = col.nullable(obj._data).rolling(window, min_periods, center)


def rolling(self: Series, *args: Any, **kwargs: Any) -> Rolling:
    return Rolling(self, *args, **kwargs)


Series.rolling = rolling


# ---- The module ---------------------------------------------------------------------------------------


def read_parquet(
    filepath_or_buffer: Any, engine: str = "cudf", columns: Any = None, row_groups: Any = None,
    use_pandas_metadata: bool = True, nrows: int | None = None, skip_rows: int | None = None,
    allow_mismatched_pq_schemas: bool = False, ignore_missing_columns: bool = True,
) -> DataFrame:  # fmt: skip
    """One file or several; a column that a file lacks is left out in silence, as cuDF does."""
    if engine != "cudf":
        raise lacks(f"cudf.read_parquet(engine={engine!r})")
    sources = filepath_or_buffer if isinstance(filepath_or_buffer, list | tuple) else [filepath_or_buffer]
    if row_groups is not None:
        row_groups = [row_groups] if isinstance(row_groups, int) else list(row_groups)
        row_groups = row_groups if isinstance(row_groups[0], list) else [row_groups]
        if len(row_groups) != len(sources):
            raise ValueError("Must specify a list of row groups for each source")
    tables = [
        _read(source, columns, None if row_groups is None else row_groups[place], ignore_missing_columns)
        for place, source in enumerate(sources)
    ]
    table = pa.concat_tables(tables)
    return _of_table(table.slice(skip_rows or 0, nrows))


def _read(source: Any, columns: Any, row_groups: Any, ignore_missing: bool) -> pa.Table:
    if isinstance(source, str | Path):
        if "://" in str(source) and not str(source).startswith("file://"):
            raise lacks(f"remote files ({source})")
        if not Path(source).exists():
            raise FileNotFoundError(f"{[str(source)]} could not be resolved to any files")
    elif not isinstance(source, io.BytesIO) and not hasattr(source, "read"):
        raise ValueError(f"Unrecognized argument type {type(source)}: a path, BytesIO or file object")
    file = pq.ParquetFile(source)
    names = file.schema_arrow.names
    wanted = names if columns is None else list(columns)
    if not ignore_missing and not set(wanted) <= set(names):
        raise ValueError(f"no columns {sorted(set(wanted) - set(names))}")
    wanted = [name for name in wanted if name in names]
    if row_groups is None:
        return file.read(wanted).select(wanted)
    return file.read_row_groups(row_groups, wanted).select(wanted)


def concat(
    objs: Any, axis: Any = 0, join: str = "outer", ignore_index: bool = False, sort: Any = None
) -> Any:
    parts = list(objs)
    if not parts:
        raise ValueError("No objects to concatenate")
    if not all(isinstance(part, DataFrame | Series) for part in parts):
        raise TypeError(f"can only concatenate cudf objects, not {[type(part).__name__ for part in parts]}")
    if axis in (1, "columns"):
        return wrap(pd.concat([part._data for part in parts], axis=1))
    held = [
        col.nullable(part._data) if isinstance(part, Series) else _nullable_table(part._data)
        for part in parts
    ]
    return wrap(pd.concat(held, join=join, ignore_index=ignore_index))


def merge(left: DataFrame, right: DataFrame, *args: Any, **kwargs: Any) -> DataFrame:
    return left.merge(right, *args, **kwargs)


def from_pandas(obj: Any, nan_as_null: bool | None = None) -> Any:
    if isinstance(obj, pd.DataFrame):
        return DataFrame(obj, nan_as_null=nan_as_null)
    if isinstance(obj, pd.Series):
        return Series(obj, name=obj.name, nan_as_null=nan_as_null)
    if isinstance(obj, pd.Index):
        return Index(obj, name=obj.name, nan_as_null=nan_as_null)
    raise TypeError(f"from_pandas of {type(obj)}")


def unique(values: Any) -> Any:
    if not isinstance(values, Series):
        raise lacks("cudf.unique of anything but a Series")
    return values.unique()


_options = {"spill": False, "spill_stats": 0, "mode.pandas_compatible": False, "copy_on_write": False}


def get_option(name: str) -> Any:
    if name not in _options:
        raise lacks(f"the option {name}")
    return _options[name]


def set_option(name: str, val: Any) -> None:
    get_option(name)
    _options[name] = val


rooms: dict[str, Room] = {
    "cudf": Room(
        "cudf",
        {
            "DataFrame": DataFrame,
            "Index": Index,
            "ListDtype": col.ListDtype,
            "NA": pd.NA,
            "NaT": pd.NaT,
            "Series": Series,
            "concat": concat,
            "dtype": np.dtype,
            "from_pandas": from_pandas,
            "get_option": get_option,
            "merge": merge,
            "read_parquet": read_parquet,
            "set_option": set_option,
            "unique": unique,
        },
    )
}
