"""Errors of the pipeline, and the exit code of every error that a user can meet.

PipelineError
├── ConfigError       the YAML, an override or a combination of settings (exit 2); lists every problem by dotted path
├── ArtifactError     a stored artifact is damaged, or the disk refused (exit 3)
├── LeaseError        another driver holds the run (exit 4)
├── TrackingError     MLflow's store is locked, absent or refused (exit 4)
├── GateError         evaluation: the adapter did not improve (exit 5)
└── Interrupted       stopped by the user between two units; resumable (exit 130)
"""

from __future__ import annotations

import errno
import os

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)
DONE, BUG, CONFIG, WEIGHTS, CLUSTER, TRAINING, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


class PipelineError(Exception):
    """Base of this package's errors."""


class ConfigError(PipelineError):
    """One or more settings are wrong; `problems` holds each as `path: what, allowed, remedy`."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class ArtifactError(PipelineError):
    """A stored artifact is missing or damaged, or the disk refused a write."""


class LeaseError(PipelineError):
    """Another live driver holds the lease of this run."""


class TrackingError(PipelineError):
    """MLflow's store cannot be used."""


class GateError(PipelineError):
    """The adapter did not improve on the model it started from."""


class Interrupted(PipelineError):
    """The user stopped the run; what is committed stays."""


def exit_code(error: BaseException) -> int:
    """The process exit code of an error (`BUG` for one that nobody expected)."""
    import cluster.errors as ce
    import lowrank.errors as le

    table: list[tuple[type[BaseException] | tuple[type[BaseException], ...], int]] = [
        ((KeyboardInterrupt, Interrupted), INTERRUPTED),
        ((ConfigError, ce.TokenError, ce.PortError, ce.DataError, ce.ModelError, ce.ResourceError), CONFIG),
        ((GateError, ce.TrainError, le.NumericsError), TRAINING),
        (le.RankError, CONFIG),
        ((ArtifactError, ce.DamagedError, ce.StorageError, le.LowRankError), WEIGHTS),
        ((LeaseError, TrackingError, ce.ClusterError), CLUSTER),
    ]
    for kinds, code in table:
        if isinstance(error, kinds):
            return code
    return WEIGHTS if is_disk_error(error) else BUG


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk refused: an `OSError`, or one of the libraries' own exceptions that only quotes it."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return True
    text = str(error)
    if any(f"(os error {number})" in text for number in _DISK):
        return True
    return any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT))


def explain(error: BaseException, code: int) -> str:
    """What a user reads: the error's own message, or one for what has none."""
    text = str(error) or type(error).__name__
    if code == INTERRUPTED and isinstance(error, KeyboardInterrupt):
        return "interrupted; what is committed stays."
    if code == BUG:
        return f"unexpected {type(error).__name__}: {text}\nThis is a bug. Run again with --debug for the traceback."
    if code == WEIGHTS and not isinstance(error, PipelineError) and is_disk_error(error):
        return (
            f"the disk refused: {text}. Free some space (`df -h`), make the directory writable, or set store.path to "
            "another disk; what is committed stays."
        )
    return text
