"""What can go wrong, and the exit code that says so.

Every message is one line: what failed, where (file, row or field), what was found, what to do.
"""


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
