# ruff: noqa: ARG002, ARG005 - parameters are those of the real library
"""cupy and cupyx, computed by NumPy.

A device array wraps a NumPy array and lets nobody at it: NumPy's functions, `numpy.asarray` and arithmetic
with host arrays raise TypeError, as in CuPy 14.  Stricter than CuPy, so that no test leans on what a GPU
leaves undefined or does behind one's back:

- NumPy functions and ufuncs of device arrays, which CuPy would dispatch, are refused (empty arrays pass:
  Dask asks with these), and so are host arrays and lists where CuPy would copy them to the device;
- an index out of bounds raises (CuPy wraps it), and so does writing an array to an index that occurs twice
  (on a GPU any of the values may win).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from standin import device as memory
from standin.manifest import API, Room, Surface, guarded, lacks, mirror

_CUPY = Surface("cupy")
_SCALARS = (bool, int, float, complex, np.generic)


def wrap(result: Any) -> Any:
    """What a computation gave, on the device: arrays and scalars become device arrays."""
    if isinstance(result, tuple | list):
        return type(result)(map(wrap, result)) if type(result) in (tuple, list) else tuple(map(wrap, result))
    host = np.asarray(result)
    if host.dtype.kind not in "biufc":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    array = object.__new__(ndarray)
    array._host = host
    memory.current().adopt(host)
    return array


def host_of(value: Any) -> Any:
    """An operand as NumPy takes it.  Raises TypeError for what CuPy cannot compute with."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, _SCALARS):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def _computed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A device divides by zero and overflows in silence."""
    with np.errstate(all="ignore"):
        return function(*args, **kwargs)


# ---- Arrays -----------------------------------------------------------------------------------------


def _index(key: Any) -> Any:
    """An index as NumPy takes it.  CuPy copies lists and host arrays used as indices to the device."""
    if isinstance(key, tuple):
        return tuple(map(_index, key))
    if isinstance(key, ndarray):
        if key.dtype.kind not in "biu":
            raise IndexError(
                f"arrays used as indices must be of integer or boolean type. (actual: {key.dtype})"
            )
        return key._host
    if isinstance(key, float | np.floating | str):
        raise IndexError(
            "only integers, slices (`:`), ellipsis (`...`), newaxis and arrays are valid indices"
        )
    return key


def _is_view(key: Any) -> bool:
    parts = key if isinstance(key, tuple) else (key,)
    return all(
        part is None
        or part is Ellipsis
        or isinstance(part, slice)
        or (isinstance(part, int | np.integer) and not isinstance(part, bool))
        for part in parts
    )


def _refuse_twice(key: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError if an index array names a place twice."""
    places = np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)[key].ravel()
    if len(np.unique(places)) < len(places):
        raise ValueError("an index occurs twice: which of the values a GPU keeps is undefined")


def _binary(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    def method(self: ndarray, other: Any) -> Any:
        if getattr(other, "_is_frame", False):
            return NotImplemented
        operands = (host_of(other), self._host) if swapped else (self._host, host_of(other))
        return wrap(_computed(function, *operands))

    return method


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: wrap(_computed(function, self._host))


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: ndarray, other: Any) -> ndarray:
        _computed(function, self._host, host_of(other), out=self._host)
        return self

    return method


def _delegated(name: str) -> Callable[..., Any]:
    """The method that does what the function of this name does."""

    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        return functions[name](self, *args, **kwargs)

    method.__name__ = name
    return method


def _names(text: str) -> list[str]:
    return text.split()


_DELEGATED = _names("""
    all any argmax argmin argsort clip conj cumprod cumsum diagonal dot max mean min nonzero prod ptp
    ravel repeat round searchsorted squeeze std sum swapaxes take trace var
""")


class Flags:
    """Read-only; fewer names than NumPy's."""

    def __init__(self, flags: Any) -> None:
        self.c_contiguous, self.f_contiguous, self.owndata = (
            flags.c_contiguous,
            flags.f_contiguous,
            flags.owndata,
        )
        self.fnc, self.forc = flags.fnc, flags.forc

    def __getitem__(self, name: str) -> bool:
        return getattr(self, name.lower())


class MemoryPointer:
    def __init__(self, host: np.ndarray) -> None:
        self.ptr = host.ctypes.data
        self.device_id = 0


@mirror("cupy.ndarray")
class ndarray:  # noqa: N801
    __slots__ = ("__weakref__", "_host")
    __hash__ = None
    __array_ufunc__ = None
    __array_priority__ = 100

    _host: np.ndarray

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: str = "C"
    ) -> None:
        if memptr is not None or strides is not None:
            raise lacks("cupy.ndarray of given memory")
        self._host = np.empty(shape, dtype, order)
        memory.current().adopt(self._host)

    # What is refused.

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy "
            "array explicitly."
        )

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        arrays = [array for array in _flat((args, kwargs)) if isinstance(array, ndarray)]
        if not any(array.size for array in arrays) and func.__name__ in functions:
            return functions[func.__name__](*args, **kwargs)
        raise TypeError(f"numpy.{func.__name__} of a device array: use cupy.{func.__name__}")

    # What it is.

    shape = property(
        lambda self: self._host.shape, lambda self, shape: setattr(self, "_host", _reshaped(self, shape))
    )
    dtype = property(lambda self: self._host.dtype)
    size = property(lambda self: self._host.size)
    ndim = property(lambda self: self._host.ndim)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    T = property(lambda self: wrap(self._host.T))
    mT = property(lambda self: wrap(self._host.mT))  # noqa: N815
    real = property(lambda self: wrap(self._host.real))
    imag = property(lambda self: wrap(self._host.imag))
    flags = property(lambda self: Flags(self._host.flags))
    data = property(lambda self: MemoryPointer(self._host))
    device = property(lambda self: Device(0))
    base = property(lambda self: None if self._host.base is None else wrap(memory._owner(self._host)))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        contiguous = self._host.flags.c_contiguous
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": [("", self.dtype.str)],
            "data": (self._host.ctypes.data, False),
            "strides": None if contiguous else self.strides,
            "stream": 1,
            "version": 3,
        }

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Any:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(f"The truth value of an array of {self.size} elements is ambiguous.")
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host.reshape(()) if self.size == 1 else self._host)

    def __float__(self) -> float:
        return float(self._host.reshape(()) if self.size == 1 else self._host)

    def __complex__(self) -> complex:
        return complex(self._host)

    def __repr__(self) -> str:
        return repr(self._host)

    def __str__(self) -> str:
        return str(self._host)

    def __format__(self, spec: str) -> str:
        return format(self._host, spec)

    def __copy__(self) -> ndarray:
        return wrap(self._host.copy())

    def __deepcopy__(self, memo: Any) -> ndarray:
        return wrap(self._host.copy())

    def __reduce__(self) -> Any:
        return _unpickled, (self._host,)

    def __getitem__(self, key: Any) -> ndarray:
        key = _index(key)
        if _is_view(key):
            # With an ellipsis NumPy gives a view of no dimensions instead of a scalar.
            key = key if isinstance(key, tuple) else (key,)
            return wrap(self._host[key if Ellipsis in key else (*key, ...)])
        return wrap(self._host[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        key, value = _index(key), host_of(value)
        if isinstance(value, np.ndarray) and value.ndim and not _is_view(key):
            _refuse_twice(key, self.shape)
        self._host[key] = value

    # Copies and conversions.

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        if out is not None:
            out[...] = self._host
            return out
        return np.array(self._host, order="K" if order == "A" else order)

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype or arr.shape != self.shape:
            raise ValueError(f"{arr.dtype} array of shape {arr.shape} set to {self.dtype} of {self.shape}")
        self._host[...] = arr

    def item(self, *args: Any) -> Any:
        return self._host.item(*args)

    def tolist(self) -> Any:
        return self._host.tolist()

    def tobytes(self, order: str = "C") -> bytes:
        return self._host.tobytes(order)

    def astype(
        self, dtype: Any, order: str = "K", casting: str = "unsafe", subok: Any = None, copy: bool = True
    ) -> ndarray:
        if not copy and self.dtype == np.dtype(dtype):
            return self
        return wrap(_computed(self._host.astype, dtype, order, casting))

    def copy(self, order: str = "C") -> ndarray:
        return wrap(self._host.copy(order))

    def view(self, dtype: Any = None, type: Any = None) -> ndarray:  # noqa: A002
        return wrap(self._host.view() if dtype is None else self._host.view(dtype))

    def fill(self, value: Any) -> None:
        self._host.fill(host_of(value))

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        return wrap(self._host.reshape(*shape, order=order))

    def transpose(self, *axes: Any) -> ndarray:
        return wrap(self._host.transpose(*axes))

    def flatten(self, order: str = "C") -> ndarray:
        return wrap(self._host.flatten(order))

    def sort(self, axis: int = -1) -> None:
        self._host.sort(axis, kind="stable")

    def scatter_add(self, slices: Any, value: Any) -> None:
        functions["add"].at(self, slices, value)

    def scatter_max(self, slices: Any, value: Any) -> None:
        functions["maximum"].at(self, slices, value)

    def scatter_min(self, slices: Any, value: Any) -> None:
        functions["minimum"].at(self, slices, value)

    # The manifest lists no operators; these are Python's.
    for _name, _function in {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "truediv": np.true_divide,
        "matmul": np.matmul,
        "floordiv": np.floor_divide,
        "mod": np.remainder,
        "pow": np.power,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "lshift": np.left_shift,
        "rshift": np.right_shift,
    }.items():
        locals().update(
            {
                f"__{_name}__": _binary(_function),
                f"__r{_name}__": _binary(_function, swapped=True),
                f"__i{_name}__": _in_place(_function),
            }
        )
    for _name in ("lt", "le", "gt", "ge", "eq", "ne", "divmod"):
        locals()[f"__{_name}__"] = _binary(getattr(operator, _name, divmod))
    __rdivmod__ = _binary(divmod, swapped=True)
    for _name in ("neg", "pos", "abs", "invert"):
        locals()[f"__{_name}__"] = _unary(getattr(operator, _name))

    for _name in _DELEGATED:
        locals()[_name] = _delegated(_name)
    del _name, _function


def _unpickled(host: np.ndarray) -> ndarray:
    return wrap(host)


def _reshaped(array: ndarray, shape: Any) -> np.ndarray:
    reshaped = array._host.reshape(shape)
    if not np.may_share_memory(reshaped, array._host):
        raise AttributeError("incompatible shape for a non-contiguous array")
    return reshaped


def _flat(value: Any) -> Any:
    """Everything in nested sequences and mappings."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for each in value:
            yield from _flat(each)
    else:
        yield value


# ---- Universal functions ----------------------------------------------------------------------------

# What CUDA's atomics cover ("scatter_add only supports ..." in cupy/_core/_routines_indexing.pyx): no int64.
_ATOMIC = {
    "add": "int32 float16 float32 float64 uint32 uint64",
    "subtract": "int32 float16 float32 float64 uint32 uint64",
    "maximum": "int32 float32 float64 uint32 uint64",
    "minimum": "int32 float32 float64 uint32 uint64",
}


@mirror("cupy.ufunc")
class ufunc:  # noqa: N801
    def __init__(self, function: np.ufunc) -> None:
        self._function = function
        self.__name__ = function.__name__
        self.name = f"cupy_{function.__name__}"

    nin = property(lambda self: self._function.nin)
    nout = property(lambda self: self._function.nout)
    nargs = property(lambda self: self._function.nargs)

    def __repr__(self) -> str:
        return f"<ufunc '{self.name}'>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        memory.current().calls[f"cupy.{self.__name__}"] += 1
        if wrong := set(kwargs) - {"out", "dtype", "casting"}:
            raise TypeError(f"Wrong arguments {sorted(wrong)} of cupy.{self.__name__}")
        args = tuple(host_of(each) for each in args)
        if (out := kwargs.pop("out", None)) is not None:
            targets = out if isinstance(out, tuple) else (out,)
            kwargs["out"] = tuple(_target(each) for each in targets)
        result = _computed(self._function, *args, **kwargs)
        return wrap(result) if out is None else out

    def at(self, a: ndarray, indices: Any, b: Any = None) -> None:
        if self.__name__ not in _ATOMIC:
            raise NotImplementedError(f"`{self.name}.at` is not supported yet")
        indices = _index(indices)
        if not _is_view(indices) and a.dtype.name not in _ATOMIC[self.__name__].split():
            raise TypeError(f"{self.name}.at only supports {_ATOMIC[self.__name__]}, not {a.dtype}")
        self._function.at(a._host, indices, host_of(b))

    def outer(self, A: ndarray, B: ndarray, **kwargs: Any) -> ndarray:  # noqa: N803
        return wrap(_computed(self._function.outer, _target(A), _target(B), **kwargs))

    def reduce(
        self, array: ndarray, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> ndarray:
        return self._by_method(
            "reduce", {"add": "sum", "multiply": "prod"}, array, axis, dtype, out, keepdims
        )

    def accumulate(self, array: ndarray, axis: Any = 0, dtype: Any = None, out: Any = None) -> ndarray:
        return self._by_method(
            "accumulate", {"add": "cumsum", "multiply": "cumprod"}, array, axis, dtype, out
        )

    def reduceat(
        self, array: ndarray, indices: Any, axis: int = 0, dtype: Any = None, out: Any = None
    ) -> ndarray:
        if self.__name__ != "add":
            raise NotImplementedError(f"`{self.name}.reduceat` is not supported yet")
        return wrap(np.add.reduceat(_target(array), host_of(indices), axis, dtype))

    def _by_method(self, asked: str, methods: dict[str, str], array: ndarray, *args: Any) -> ndarray:
        if self.__name__ not in methods:
            raise NotImplementedError(f"`{self.name}.{asked}` is not supported yet")
        return functions[methods[self.__name__]](array, *args)


def _target(array: Any) -> np.ndarray:
    if not isinstance(array, ndarray):
        raise TypeError(f"must be a cupy.ndarray, not {type(array)}")
    return array._host


# ---- Functions --------------------------------------------------------------------------------------

_OF_ARRAYS = _names("""
    all allclose amax amin any append argmax argmin argpartition argsort argwhere around array_equal
    array_split atleast_1d atleast_2d average bincount broadcast_to choose clip column_stack compress
    concatenate copyto corrcoef count_nonzero cov cross cumprod cumsum delete diag diagonal diff
    digitize dot dsplit dstack ediff1d einsum expand_dims extract fill_diagonal flatnonzero flip fliplr
    flipud gradient histogram hsplit hstack inner interp intersect1d isclose isin isneginf isposinf kron
    lexsort matmul max mean median min moveaxis nan_to_num nanargmax nanargmin nancumprod nancumsum
    nanmax nanmean nanmedian nanmin nanprod nanstd nansum nanvar nonzero outer pad partition percentile
    prod ptp put_along_axis quantile ravel repeat reshape resize roll rollaxis rot90 round searchsorted
    setdiff1d sort split squeeze stack std sum swapaxes take take_along_axis tensordot tile trace
    transpose trapezoid tril triu union1d unique unwrap vdot vsplit vstack where
""")
_OF_SHAPES = _names("arange empty eye identity indices linspace logspace ones tri zeros")
_LIKE = _names("empty_like ones_like zeros_like")
_OF_TYPES = _names("can_cast finfo iinfo isdtype isscalar issubdtype promote_types dtype")

_PLAIN = {
    "shape",
    "newshape",
    "new_shape",
    "axis",
    "axes",
    "repeats",
    "reps",
    "indices_or_sections",
    "source",
    "destination",
    "shift",
    "pad_width",
    "bins",
    "range",
    "q",
    "kwargs",
    "operands",
}
"""Parameters that take lists of plain numbers; everything else that is an array must be on the device."""


def _argument(label: str, parameter: str, value: Any) -> Any:
    """An argument of a function as NumPy takes it."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"{label}: {parameter}: Unsupported type {type(value)}")
    if isinstance(value, tuple | list):
        if parameter not in _PLAIN and not any(isinstance(each, ndarray) for each in _flat(value)):
            raise TypeError(f"{label}: {parameter} must be a cupy.ndarray, not {type(value)}")
        return type(value)(_argument(label, parameter, each) for each in value)
    if isinstance(value, dict):
        return {key: _argument(label, parameter, each) for key, each in value.items()}
    if getattr(value, "_is_frame", False):
        raise TypeError(f"{label}: {parameter}: Unsupported type {type(value)}")
    return value


def _of_arrays(name: str) -> Callable[..., Any]:
    """NumPy's function of this name, for device arrays with the real parameters."""
    label, signature = f"cupy.{name}", _CUPY.signature(name)
    assert signature is not None, name
    computes = getattr(np, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = {each: _argument(label, each, value) for each, value in bound.arguments.items()}
        if not any(isinstance(each, ndarray) for each in _flat(tuple(bound.arguments.values())[:1])):
            raise TypeError(f"{label} needs a cupy.ndarray first")
        if (check := _CHECKS.get(name)) is not None:
            check(**bound.arguments)
        bound.arguments.update(given)
        try:
            result = _computed(computes, *bound.args, **bound.kwargs)
        except TypeError as error:
            if "keyword argument" in str(error):
                raise lacks(f"an argument of {label}() ({error})") from None
            raise
        if (out := kwargs.get("out")) is not None:
            return out
        return result if result is None else wrap(result)

    return guarded(label, call, signature)


def _check_searchsorted(a: Any, v: Any, **_: Any) -> None:
    if not isinstance(v, ndarray | int | float | complex):
        raise NotImplementedError("Only python scalars or ndarrays are supported for v")


def _check_sort(kind: Any = None, **_: Any) -> None:
    if kind not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")


def _check_lexsort(keys: Any) -> None:
    if not isinstance(keys, ndarray):
        raise TypeError("cupy.lexsort: keys must be one cupy.ndarray, a row per key")
    if keys.ndim > 2:
        raise NotImplementedError("Keys with the rank of three or more is not supported in lexsort")


def _check_isin(test_elements: Any, **_: Any) -> None:
    _target(test_elements)


_CHECKS: dict[str, Callable[..., None]] = {
    "searchsorted": _check_searchsorted,
    "sort": _check_sort,
    "argsort": _check_sort,
    "lexsort": _check_lexsort,
    "isin": _check_isin,
}


def _of_shapes(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, ndarray):
                raise TypeError(
                    f"cupy.{name} takes numbers of the host, not a cupy.ndarray: use int() or float()"
                )
        return wrap(getattr(np, name)(*args, **kwargs))

    return guarded(f"cupy.{name}", call, _CUPY.signature(name))


def _like(name: str) -> Callable[..., Any]:
    def call(a: ndarray, *args: Any, **kwargs: Any) -> Any:
        return wrap(getattr(np, name)(_target(a), *args, **kwargs))

    return guarded(f"cupy.{name}", call, _CUPY.signature(name))


def _uploaded(obj: Any, dtype: Any, copy: bool | None, order: str | None) -> ndarray:
    """A device array of anything; host memory is always copied."""
    if getattr(obj, "_is_frame", False):
        obj = obj.values
    if isinstance(obj, ndarray):
        host = np.array(obj._host, dtype, copy=copy, order=order or "K")
        return obj if host is obj._host else wrap(host)
    if isinstance(obj, list | tuple) and any(isinstance(each, ndarray) for each in _flat(obj)):
        obj = [_argument("cupy.array", "obj", each) for each in obj]
    return wrap(np.array(obj, dtype, order=order or "K"))


def array(
    obj: Any,
    dtype: Any = None,
    copy: bool = True,
    order: str = "K",
    subok: bool = False,
    ndmin: int = 0,
    *,
    blocking: bool = False,
) -> ndarray:
    made = _uploaded(obj, dtype, copy or None, order)
    return made if made.ndim >= ndmin else made.reshape((1,) * (ndmin - made.ndim) + made.shape)


def asarray(
    a: Any, dtype: Any = None, order: str | None = None, *, copy: bool | None = None, blocking: bool = False
) -> ndarray:
    return _uploaded(a, dtype, copy, order)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    return _uploaded(a, dtype, None, "C")


def asfortranarray(a: Any, dtype: Any = None) -> ndarray:
    return _uploaded(a, dtype, None, "F")


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    return wrap(np.full(shape, host_of(fill_value), dtype, order))


def full_like(
    a: ndarray, fill_value: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    return wrap(np.full_like(_target(a), host_of(fill_value), dtype, order, shape=shape))


def copy(a: ndarray, order: str = "K") -> ndarray:
    return wrap(_target(a).copy(order))


def asnumpy(
    a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True
) -> np.ndarray:
    if isinstance(a, ndarray):
        return a.get(stream=stream, order=order, out=out, blocking=blocking)
    return np.asarray(a, order=order)


def get_array_module(*args: Any) -> ModuleType:
    return rooms["cupy"] if any(isinstance(each, ndarray) for each in args) else np


def may_share_memory(a: ndarray, b: ndarray, max_work: Any = None) -> bool:
    return np.may_share_memory(_target(a), _target(b))


def shares_memory(a: ndarray, b: ndarray, max_work: Any = None) -> bool:
    return np.shares_memory(_target(a), _target(b))


def result_type(*arrays_and_dtypes: Any) -> np.dtype:
    return np.result_type(*(each._host if isinstance(each, ndarray) else each for each in arrays_and_dtypes))


def ndim(a: Any) -> int:
    return a.ndim if isinstance(a, ndarray) else np.ndim(a)


def shape(a: Any) -> tuple[int, ...]:
    return a.shape if isinstance(a, ndarray) else np.shape(a)


def size(a: ndarray, axis: int | None = None) -> int:
    return np.size(_target(a), axis)


def put(a: ndarray, ind: Any, v: Any, mode: str = "wrap") -> None:
    np.put(_target(a), host_of(ind), host_of(v), mode=mode)


def broadcast_arrays(*args: ndarray) -> list[ndarray]:
    return [wrap(each) for each in np.broadcast_arrays(*map(_target, args))]


def meshgrid(*xi: ndarray, **kwargs: Any) -> list[ndarray]:
    return [wrap(each) for each in np.meshgrid(*map(_target, xi), **kwargs)]


def is_available() -> bool:
    return True


def register_with_dask() -> None:
    """Dask joins blocks with what dask/array/backends.py registers for CuPy."""
    from dask.array.dispatch import concatenate_lookup

    concatenate_lookup.register(ndarray, functions["concatenate"])


# ---- Memory, streams and devices ----------------------------------------------------------------------


@mirror("cupy.cuda.MemoryPool")
class MemoryPool:
    def __init__(self, allocator: Any = None) -> None:
        pass

    def used_bytes(self) -> int:
        return memory.current().allocated if memory.current().allocator == "cupy" else 0

    def total_bytes(self) -> int:
        return self.used_bytes()

    def free_bytes(self) -> int:
        return 0

    def n_free_blocks(self) -> int:
        return 0

    def free_all_blocks(self, stream: Any = None) -> None:
        pass

    def malloc(self, size: int) -> MemoryPointer:
        raise lacks("cupy.cuda.MemoryPool.malloc")

    def get_limit(self) -> int:
        return memory.current().limit or 0

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        if (size is None) == (fraction is None):
            raise ValueError("size and fraction cannot be specified at one time, and one of them must be")
        memory.current().limit = int(memory.TOTAL * fraction) if fraction is not None else (size or None)


@mirror("cupy.cuda.PinnedMemoryPool")
class PinnedMemoryPool:
    def __init__(self, allocator: Any = None) -> None:
        pass

    def free_all_blocks(self) -> None:
        pass

    def n_free_blocks(self) -> int:
        return 0


_pool, _pinned_pool = MemoryPool(), PinnedMemoryPool()


def set_allocator(allocator: Any = None) -> None:
    memory.current().allocator = (
        "rmm" if getattr(allocator, "__name__", "") == "rmm_cupy_allocator" else "cupy"
    )


class _Context:
    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@mirror("cupy.cuda.Device")
class Device(_Context):
    compute_capability = "90"

    def __init__(self, device: int | None = None) -> None:
        if device not in (None, 0):
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self.id = 0

    mem_info = property(lambda self: memGetInfo())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)

    def __int__(self) -> int:
        return 0

    def __hash__(self) -> int:
        return 0

    def use(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@mirror("cupy.cuda.Stream")
class Stream(_Context):
    null: Stream
    ptds: Stream

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: Any = None
    ) -> None:
        self.ptr, self.device_id = (0 if null else id(self)), 0

    done = property(lambda self: True)

    def use(self) -> Stream:
        return self

    def synchronize(self) -> None:
        pass

    def record(self, event: Event | None = None) -> Event:
        return event or Event()

    def wait_event(self, event: Event) -> None:
        pass


Stream.null = Stream.ptds = Stream(null=True)


@mirror("cupy.cuda.Event")
class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.ptr = id(self)

    done = property(lambda self: True)

    def record(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CUDARuntimeError(RuntimeError):
    pass


def memGetInfo() -> tuple[int, int]:
    device = memory.current()
    return device.total - device.allocated, device.total


def getDeviceProperties(device: int) -> dict[str, Any]:
    return {
        "name": b"stand-in",
        "totalGlobalMem": memory.current().total,
        "multiProcessorCount": 132,
        "major": 9,
        "minor": 0,
        "maxThreadsPerBlock": 1024,
        "sharedMemPerBlock": 49152,
        "warpSize": 32,
    }


# ---- Modules ------------------------------------------------------------------------------------------


def scatter_add(a: ndarray, slices: Any, value: Any) -> None:
    a.scatter_add(slices, value)


def scatter_max(a: ndarray, slices: Any, value: Any) -> None:
    a.scatter_max(slices, value)


def scatter_min(a: ndarray, slices: Any, value: Any) -> None:
    a.scatter_min(slices, value)


def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    return np.empty(shape, dtype, order)


def zeros_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    return np.zeros(shape, dtype, order)


def as_strided(x: ndarray, shape: Any = None, strides: Any = None) -> ndarray:
    return wrap(np.lib.stride_tricks.as_strided(_target(x), shape, strides))


def sliding_window_view(
    x: ndarray, window_shape: Any, axis: Any = None, *, subok: bool = False, writeable: bool = False
) -> ndarray:
    return wrap(np.lib.stride_tricks.sliding_window_view(_target(x), window_shape, axis))


def _ufuncs() -> dict[str, ufunc]:
    """Every ufunc that CuPy and NumPy share: those that the manifest lists as callables without signature."""
    shared = {name: getattr(np, name, None) for name, entry in API["cupy"].items() if "p" not in entry}
    return {name: ufunc(each) for name, each in shared.items() if isinstance(each, np.ufunc)}


def _types() -> dict[str, Any]:
    """Scalar types, constants and functions of types are NumPy's own."""
    names = [*_OF_TYPES, *_names("e euler_gamma inf nan newaxis pi s_ index_exp bool")]
    return {name: getattr(np, name) for name in names} | {
        name: value
        for name in API["cupy"]
        if inspect.isclass(value := getattr(np, name, None)) and issubclass(value, np.generic)
    }


functions: dict[str, Any] = {
    **_ufuncs(),
    **{name: _of_arrays(name) for name in _OF_ARRAYS},
    **{name: _of_shapes(name) for name in _OF_SHAPES},
    **{name: _like(name) for name in _LIKE},
    **{
        each.__name__: each
        for each in (
            array,
            asarray,
            ascontiguousarray,
            asfortranarray,
            asnumpy,
            broadcast_arrays,
            copy,
            full,
            full_like,
            get_array_module,
            is_available,
            may_share_memory,
            meshgrid,
            ndim,
            put,
            result_type,
            shape,
            shares_memory,
            size,
        )
    },
    "asanyarray": asarray,
    "concat": _of_arrays("concat"),
    "get_default_memory_pool": lambda: _pool,
    "get_default_pinned_memory_pool": lambda: _pinned_pool,
}

rooms: dict[str, Room] = {
    "cupy.cuda.memory": Room(
        "cupy.cuda.memory",
        {
            "OutOfMemoryError": memory.OutOfMemoryError,
            "MemoryPool": MemoryPool,
            "MemoryPointer": MemoryPointer,
            "set_allocator": set_allocator,
        },
    ),
    "cupy.cuda.runtime": Room(
        "cupy.cuda.runtime",
        {
            "CUDARuntimeError": CUDARuntimeError,
            "getDeviceProperties": getDeviceProperties,
            "memGetInfo": memGetInfo,
            "getDeviceCount": lambda: 1,
            "getDevice": lambda: 0,
            "setDevice": lambda device: None,
            "deviceSynchronize": lambda: None,
            "streamSynchronize": lambda stream: None,
            "runtimeGetVersion": lambda: 13000,
            "driverGetVersion": lambda: 13000,
        },
    ),
    "cupyx": Room(
        "cupyx",
        {each.__name__: each for each in (scatter_add, scatter_max, scatter_min, empty_pinned, zeros_pinned)},
    ),
    "cupy.lib.stride_tricks": Room(
        "cupy.lib.stride_tricks", {"as_strided": as_strided, "sliding_window_view": sliding_window_view}
    ),
    "cupy.random": Room("cupy.random", {}),
    "cupy.linalg": Room("cupy.linalg", {}),
}
rooms["cupy.lib"] = Room("cupy.lib", {"stride_tricks": rooms["cupy.lib.stride_tricks"]})
rooms["cupy.cuda"] = Room(
    "cupy.cuda",
    {
        "memory": rooms["cupy.cuda.memory"],
        "runtime": rooms["cupy.cuda.runtime"],
        "Device": Device,
        "Stream": Stream,
        "Event": Event,
        "MemoryPool": MemoryPool,
        "PinnedMemoryPool": PinnedMemoryPool,
        "MemoryPointer": MemoryPointer,
        "set_allocator": set_allocator,
        "is_available": is_available,
        "get_current_stream": lambda: Stream.null,
        "get_elapsed_time": lambda start_event, end_event: 0.0,
        "get_device_id": lambda: 0,
    },
)
rooms["cupy"] = Room(
    "cupy",
    {
        **_types(),
        **functions,
        "ndarray": ndarray,
        "ufunc": ufunc,
        "cuda": rooms["cupy.cuda"],
        "lib": rooms["cupy.lib"],
        "random": rooms["cupy.random"],
        "linalg": rooms["cupy.linalg"],
    },
)
