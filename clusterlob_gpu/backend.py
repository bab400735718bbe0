"""Which machine computes: chosen once, at the edge, and handed down.

This version computes on the CPU alone; `gpu` is refused instead of being quietly ignored.
"""

from __future__ import annotations

from clusterlob_gpu.errors import InputError


def choose(asked: str) -> str:
    """Backend of a run: `cpu` for auto and cpu.  Raises InputError for gpu."""
    if asked == "gpu":
        raise InputError("--backend gpu: this version computes on the CPU only; use auto or cpu")
    return "cpu"
