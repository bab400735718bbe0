"""Columns of the cudf stand-in, held by pandas in one of three forms.

A NumPy dtype where nothing is null, pandas' masked dtype of the same kind where something is, Arrow's for
texts and lists.  So a null is told from a NaN, as in cuDF, and an integer column with nulls stays one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from standin import cupy_standin as cupy
from standin.device import current
from standin.manifest import lacks

_MASKED: dict[str, Any] = {
    "b": pd.arrays.BooleanArray,
    "i": pd.arrays.IntegerArray,
    "u": pd.arrays.IntegerArray,
    "f": pd.arrays.FloatingArray,
}


def parts_of(array: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Values and mask of a masked array; None of any other."""
    return (array._data, array._mask) if isinstance(array, tuple(set(_MASKED.values()))) else None


def values_of(data: pd.Series) -> np.ndarray:
    """The values themselves, under the mask too: what is written to them is in the column, as on a device."""
    parts = parts_of(data.array)
    return data.array._ndarray if parts is None else parts[0]


def masked(values: np.ndarray, mask: np.ndarray) -> Any:
    return _MASKED[values.dtype.kind](values, mask)


def from_arrow(array: Any) -> Any:
    """A column of an Arrow array: NaN and null stay apart."""
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        return array.to_pandas().array
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        mask = np.array(array.is_null().to_numpy(zero_copy_only=False))
        filled = array.fill_null(False if pa.types.is_boolean(kind) else 0)
        return masked(np.array(filled.to_numpy(zero_copy_only=False)), mask)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_list(kind):
        return pd.arrays.ArrowExtensionArray(pa.chunked_array([array]))
    if pa.types.is_large_list(kind):
        return from_arrow(array.cast(pa.list_(kind.value_type)))
    if pa.types.is_null(kind):
        return from_arrow(array.cast(pa.string()))
    raise lacks(f"columns of Arrow's {kind}")


def normal(data: pd.Series) -> pd.Series:
    """The same values in one of the three forms."""
    array = data.array
    if (parts := parts_of(array)) is not None:
        values, mask = parts
        return data if mask.any() else pd.Series(values, data.index, name=data.name, copy=False)
    if isinstance(array, pd.arrays.ArrowExtensionArray):
        made = from_arrow(array._pa_array)
        if not isinstance(made, pd.arrays.ArrowExtensionArray):
            return normal(pd.Series(made, data.index, name=data.name))
        return data
    if isinstance(data.dtype, np.dtype) and data.dtype.kind in "biufmM":
        return data
    if data.dtype == object or isinstance(data.dtype, pd.StringDtype):
        made = pa.array(data.to_numpy(object), from_pandas=True)
        return normal(pd.Series(from_arrow(made), data.index, name=data.name))
    raise lacks(f"columns of dtype {data.dtype}")


def nullable(data: pd.Series) -> pd.Series:
    """The masked form even without nulls, for what may bring some."""
    if isinstance(data.dtype, np.dtype) and data.dtype.kind in "biuf":
        values = values_of(data)
        array = masked(values, np.zeros(len(values), bool))
        return pd.Series(array, data.index, name=data.name, copy=False)
    return data


def arrow_of(data: pd.Series) -> pa.Array:
    if (parts := parts_of(data.array)) is not None:
        return pa.array(parts[0], mask=parts[1], from_pandas=False)
    if isinstance(data.array, pd.arrays.ArrowExtensionArray):
        return data.array._pa_array.combine_chunks()
    return pa.array(data.to_numpy(), from_pandas=data.dtype.kind in "mM")


def nans(data: pd.Series) -> np.ndarray:
    values = np.empty(0) if isinstance(data.array, pd.arrays.ArrowExtensionArray) else values_of(data)
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(data), bool)


def nulls(data: pd.Series) -> np.ndarray:
    """Which rows are null; a NaN is not."""
    if (parts := parts_of(data.array)) is not None:
        return parts[1]
    if isinstance(data.dtype, np.dtype) and data.dtype.kind == "f":
        return np.zeros(len(data), bool)
    return np.asarray(data.isna())


def nans_to_nulls(data: pd.Series) -> pd.Series:
    """NaN turned into null."""
    if not (absent := nans(data)).any():
        return data
    values, mask = parts_of(nullable(data).array)
    return pd.Series(masked(values, mask | absent), data.index, name=data.name)


def cast(data: pd.Series, dtype: Any) -> pd.Series:
    if isinstance(dtype, pd.api.extensions.ExtensionDtype) or dtype in (object, "category"):
        raise lacks(f"casts to {dtype}")
    if dtype in (str, "str", "string"):
        return normal(pd.Series(from_arrow(pc.cast(arrow_of(data), pa.string())), data.index, name=data.name))
    if isinstance(data.array, pd.arrays.ArrowExtensionArray):
        cast = pc.cast(arrow_of(data), pa.from_numpy_dtype(np.dtype(dtype)))
        return normal(pd.Series(from_arrow(cast), data.index, name=data.name))
    wanted = np.dtype(dtype)
    parts = parts_of(data.array)
    values = values_of(data)
    with np.errstate(all="ignore"):
        cast_values = values.astype(wanted)
    array = cast_values if parts is None else masked(cast_values, parts[1])
    return pd.Series(array, data.index, name=data.name)


def adopt(holder: Any, data: pd.Series) -> None:
    """Count the memory of a column that `holder` shows."""
    device = current()
    if isinstance(data.array, pd.arrays.ArrowExtensionArray):
        for chunk in data.array._pa_array.chunks:
            for buffer in filter(None, chunk.buffers()):
                device.hold(holder, buffer.address, buffer.size, "rmm")
        return
    for part in parts_of(data.array) or (values_of(data),):
        device.adopt(part, "rmm")


def to_device(data: pd.Series, dtype: Any, na_value: Any) -> cupy.ndarray:
    """The values; nulls become NaN, of integers too."""
    kind = dtype_of(data).kind
    if kind not in "biuf":
        raise NotImplementedError(f"CuPy does not support {dtype_of(data)}")
    parts = parts_of(data.array)
    values = values_of(data)
    if parts is not None:
        if na_value is not None:
            values = np.where(parts[1], np.array(na_value, values.dtype), values)
        elif kind == "b":
            raise ValueError("Cannot convert to cupy bool array with nulls.")
        elif dtype is not None:
            raise ValueError(f"cannot convert to '{dtype}'-dtype NumPy array with missing values.")
        else:
            values = values.astype(values.dtype if kind == "f" else np.float64)
            values[parts[1]] = np.nan
    return cupy.wrap(values if dtype is None else values.astype(dtype, copy=False))


def dtype_of(data: pd.Series) -> Any:
    if isinstance(data.array, pd.arrays.ArrowExtensionArray):
        kind = data.array._pa_array.type
        return ListDtype(kind.value_type) if pa.types.is_list(kind) else np.dtype(object)
    return data.dtype if isinstance(data.dtype, np.dtype) else data.dtype.numpy_dtype


class ListDtype:
    """The dtype of a column of lists."""

    kind = "O"

    def __init__(self, element_type: Any) -> None:
        self.element_type = element_type

    def __eq__(self, other: object) -> bool:
        return other == "list" or (isinstance(other, ListDtype) and other.element_type == self.element_type)

    def __hash__(self) -> int:
        return hash("list")

    def __repr__(self) -> str:
        return f"ListDtype({self.element_type})"


def to_host(data: pd.Series) -> pd.Series:
    """A host copy as cuDF makes it: nulls of numbers become NaN, lists and texts objects."""
    if (parts := parts_of(data.array)) is not None:
        kind = parts[0].dtype.kind
        values = parts[0].astype(object if kind == "b" else parts[0].dtype if kind == "f" else np.float64)
        values[parts[1]] = None if kind == "b" else np.nan
        return pd.Series(values, data.index, name=data.name)
    if isinstance(data.array, pd.arrays.ArrowExtensionArray):
        made = data.array._pa_array.to_pandas()
        return pd.Series(made.array, data.index, name=data.name)
    return data.copy()


def filled(data: pd.Series, value: Any) -> pd.Series:
    """Nulls and NaN replaced, in the dtype of the column."""
    if dtype_of(data).kind not in "biuf":
        return normal(data.fillna(value))
    values, mask = parts_of(nullable(data).array)
    missing = mask | nans(data)
    if isinstance(value, pd.Series):
        value = value.to_numpy()
    elif not np.can_cast(np.min_scalar_type(value), values.dtype, "same_kind"):
        raise TypeError(f"Cannot safely cast non-equivalent {type(value).__name__} to {values.dtype}")
    return pd.Series(np.where(missing, value, values).astype(values.dtype), data.index, name=data.name)


def table_of(columns: Mapping[Any, pd.Series], index: pd.Index | None = None) -> pd.DataFrame:
    if not columns:
        return pd.DataFrame(index=index)
    return pd.DataFrame({name: column.array for name, column in columns.items()}, index=index, copy=False)


def plain_index(index: pd.Index) -> pd.Index:
    """An index of numbers in NumPy's dtype, where it has no nulls."""
    if isinstance(index, pd.MultiIndex) or parts_of(index.array) is None or index.hasnans:
        return index
    return pd.Index(parts_of(index.array)[0], name=index.name)
