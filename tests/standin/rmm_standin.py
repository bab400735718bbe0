# ruff: noqa: ARG002, ARG005 - parameters are those of the real library
"""rmm: memory resources that change nothing but what they say and who hands out CuPy's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from standin.device import current
from standin.manifest import Room, mirror


class RMMError(Exception):
    def __init__(self, errcode: int, msg: str) -> None:
        super().__init__(msg)
        self.errcode = errcode


# Parameters of the resources are those of rmm/pylibrmm/memory_resource/_memory_resource.pyi.


class DeviceMemoryResource:
    pass


class CudaMemoryResource(DeviceMemoryResource):
    pass


class ManagedMemoryResource(DeviceMemoryResource):
    pass


class CudaAsyncMemoryResource(DeviceMemoryResource):
    def __init__(
        self,
        initial_pool_size: int | str | None = None,
        release_threshold: int | None = None,
        enable_ipc: bool = False,
        enable_fabric: bool = False,
    ) -> None:
        pass


class UpstreamResourceAdaptor(DeviceMemoryResource):
    def __init__(self, upstream_mr: DeviceMemoryResource) -> None:
        if not isinstance(upstream_mr, DeviceMemoryResource):
            raise TypeError(f"upstream_mr must be a DeviceMemoryResource, not {type(upstream_mr)}")
        self.upstream_mr = upstream_mr

    def get_upstream(self) -> DeviceMemoryResource:
        return self.upstream_mr


class PoolMemoryResource(UpstreamResourceAdaptor):
    def __init__(
        self,
        upstream_mr: DeviceMemoryResource,
        initial_pool_size: int | str | None = None,
        maximum_pool_size: int | str | None = None,
    ) -> None:
        super().__init__(upstream_mr)


class LimitingResourceAdaptor(UpstreamResourceAdaptor):
    def __init__(self, upstream_mr: DeviceMemoryResource, allocation_limit: int) -> None:
        super().__init__(upstream_mr)
        self.allocation_limit = allocation_limit

    def get_allocated_bytes(self) -> int:
        return current().allocated

    def get_allocation_limit(self) -> int:
        return self.allocation_limit


class TrackingResourceAdaptor(UpstreamResourceAdaptor):
    def __init__(self, upstream_mr: DeviceMemoryResource, capture_stacks: bool = False) -> None:
        super().__init__(upstream_mr)

    def get_allocated_bytes(self) -> int:
        return current().allocated


class StatisticsResourceAdaptor(UpstreamResourceAdaptor):
    @property
    def allocation_counts(self) -> Statistics:
        return Statistics(current().allocated, current().peak)


@dataclass
class Statistics:
    """The two counters that the stand-in knows."""

    current_bytes: int
    peak_bytes: int


_resource: DeviceMemoryResource = CudaMemoryResource()


def get_current_device_resource() -> DeviceMemoryResource:
    return _resource


def set_current_device_resource(mr: DeviceMemoryResource) -> None:
    global _resource
    if not isinstance(mr, DeviceMemoryResource):
        raise TypeError(f"mr must be a DeviceMemoryResource, not {type(mr)}")
    _resource = mr
    if isinstance(mr, LimitingResourceAdaptor):
        current().limit = mr.allocation_limit


def reinitialize(
    pool_allocator: bool = False,
    managed_memory: bool = False,
    initial_pool_size: int | str | None = None,
    maximum_pool_size: int | str | None = None,
    devices: int | list[int] = 0,
) -> None:
    base = ManagedMemoryResource() if managed_memory else CudaMemoryResource()
    set_current_device_resource(PoolMemoryResource(base) if pool_allocator else base)


def available_device_memory() -> tuple[int, int]:
    return current().total - current().allocated, current().total


def enable_statistics() -> None:
    if not isinstance(_resource, StatisticsResourceAdaptor):
        set_current_device_resource(StatisticsResourceAdaptor(_resource))


def get_statistics() -> Statistics | None:
    return _resource.allocation_counts if isinstance(_resource, StatisticsResourceAdaptor) else None


@contextmanager
def statistics() -> Iterator[None]:
    before = _resource
    enable_statistics()
    try:
        yield
    finally:
        set_current_device_resource(before)


@mirror("rmm.DeviceBuffer")
class DeviceBuffer:
    def __init__(self, *, ptr: int = 0, size: int = 0) -> None:
        self._host = np.empty(size, np.uint8)
        current().adopt(self._host, "rmm")

    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    ptr = property(lambda self: self._host.ctypes.data)

    def __len__(self) -> int:
        return self._host.size

    def tobytes(self) -> bytes:
        return self._host.tobytes()

    @classmethod
    def to_device(cls, b: Any) -> DeviceBuffer:
        made = cls(size=len(b))
        made._host[:] = np.frombuffer(b, np.uint8)
        return made


def rmm_cupy_allocator(nbytes: int) -> DeviceBuffer:
    return DeviceBuffer(size=nbytes)


_resources = (
    CudaAsyncMemoryResource, CudaMemoryResource, DeviceMemoryResource, LimitingResourceAdaptor,
    ManagedMemoryResource, PoolMemoryResource, StatisticsResourceAdaptor, TrackingResourceAdaptor,
    UpstreamResourceAdaptor,
)  # fmt: skip

rooms: dict[str, Room] = {
    "rmm.mr": Room(
        "rmm.mr",
        {
            **{each.__name__: each for each in _resources},
            "available_device_memory": available_device_memory,
            "get_current_device_resource": get_current_device_resource,
            "set_current_device_resource": set_current_device_resource,
            "get_per_device_resource": lambda device: get_current_device_resource(),
            "set_per_device_resource": lambda device, mr: set_current_device_resource(mr),
            "is_initialized": lambda: True,
        },
    ),
    "rmm.statistics": Room(
        "rmm.statistics",
        {
            "Statistics": Statistics,
            "enable_statistics": enable_statistics,
            "get_statistics": get_statistics,
            "statistics": statistics,
        },
    ),
    "rmm.allocators.cupy": Room("rmm.allocators.cupy", {"rmm_cupy_allocator": rmm_cupy_allocator}),
}
# Importing rmm imports neither of the two; a program has to.
rooms["rmm.allocators"] = Room("rmm.allocators", {})
rooms["rmm"] = Room(
    "rmm",
    {
        "mr": rooms["rmm.mr"],
        "DeviceBuffer": DeviceBuffer,
        "RMMError": RMMError,
        "reinitialize": reinitialize,
        "is_initialized": lambda: True,
    },
)
