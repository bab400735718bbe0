"""What can go wrong, and the exit code that says so.

Every message is one line: what failed, where (file, row or field), what was found, what to do.
"""

from __future__ import annotations

from collections.abc import Mapping


class ClusterlobError(Exception):
    """The job failed; nothing half-written is left behind."""

    exit_code = 1


class InputError(ClusterlobError):
    """Bad usage, config or input: the user can mend it."""

    exit_code = 2


class ConfigError(InputError):
    """A config field has a value that cannot be used."""


class LakeError(InputError):
    """A table of the lake, or a file on its way into it, is missing, broken or inconsistent."""


class WorkerLostError(ClusterlobError):
    """A task took its worker down, or found no memory: it needs more than a worker has."""


class TasksFailed(ClusterlobError):  # noqa: N818 - says what happened: the other tasks are done
    """Some tasks of a stage failed by their own fault; all others were run to their end."""

    def __init__(self, stage: str, failed: Mapping[int, Exception]) -> None:
        """`failed` gives the error of each failed task by its place among the stage's items."""
        self.stage = stage
        self.failed = dict(sorted(failed.items()))
        first, *more = self.failed.values()
        super().__init__(f"{first}; and {len(more)} more" if more else f"{first}")

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """2 if the user can mend all of them, else 1."""
        return 2 if all(isinstance(error, InputError) for error in self.failed.values()) else 1
