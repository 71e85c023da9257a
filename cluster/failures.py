"""What a failed Ray task means: the user's own exception, or one of ours for a failure of the cluster."""

from typing import Any

from cluster.errors import ClusterError, ConnectError, JobError, OutOfMemoryError, ResourceError, TokenError

#: What Python, torch, CUDA, the system and Ray say.
_MEMORY = ("out of memory", "outofmemory", "allocate memory", "not enough memory", "low on memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a worker had too little memory, whoever raised it."""
    if isinstance(error, MemoryError | OutOfMemoryError):
        return True
    return isinstance(error, Exception) and any(words in str(error).lower() for words in _MEMORY)


def translate(error: Exception, doing: str) -> Exception:
    """Return the exception to raise for what `ray.get` raised while `doing` something; chain `error` to it.

    An exception of the task itself comes back as the very type that was raised there, with its remote traceback in
    the text of `error`. A failure of the system becomes a `ClusterError` that says what to change.
    """
    import ray.exceptions as rex

    cause: Any = error
    while isinstance(cause, rex.RayTaskError) and cause.cause is not None:
        cause = cause.cause
    if not isinstance(cause, rex.RayError):
        return cause if isinstance(cause, Exception) else JobError(f"{doing}: {cause!r}")
    return _system_failure(cause, doing)


def _system_failure(error: Any, doing: str) -> ClusterError:
    import ray.exceptions as rex

    lines = str(error).strip().splitlines() or ["no message"]
    if type(error) in (rex.UnserializableException, rex.RayError):
        return JobError(
            f"{doing}: it raised an exception that does not pickle ({lines[-1]}). See the chained traceback; give the "
            "exception class positional arguments only, or a __reduce__."
        )
    table: list[tuple[tuple[type, ...], type[ClusterError], str]] = [
        ((rex.OutOfMemoryError,), OutOfMemoryError, "the node ran out of memory"),
        ((rex.ObjectStoreFullError,), ResourceError,
         "the object store is full. Lower max_in_flight, or ask for more CPUs or memory per task"),
        ((rex.OutOfDiskError,), ResourceError, "the node ran out of disk. Free space in its temporary directory"),
        ((rex.TaskUnschedulableError, rex.ActorUnschedulableError, rex.RuntimeEnvSetupError), ResourceError,
         "no node can run it. Ask for less, or add a node that fits"),
        ((rex.AuthenticationError,), TokenError, "the cluster refused the token"),
        ((rex.TaskCancelledError,), JobError, "it was cancelled"),
        ((rex.WorkerCrashedError, rex.NodeDiedError, rex.ActorDiedError, rex.ActorUnavailableError), JobError,
         "its worker or node died, every retry included. A process that is killed without a word has most often "
         "used too much memory: lower max_in_flight, then resume"),
        ((rex.ObjectLostError,), JobError, "a value was lost with the node that held it. Resume the run"),
        ((rex.RaySystemError, rex.LocalRayletDiedError, rex.RpcError), ConnectError,
         "the connection to the cluster broke. Resume the run"),
    ]  # fmt: skip
    for types, ours, advice in table:
        if isinstance(error, types):
            return ours(f"{doing}: {advice} ({type(error).__name__}: {lines[0].rstrip('.')}).")
    return JobError(f"{doing}: {type(error).__name__}: {lines[0].rstrip('.')}. Resume the run.")
