"""Errors a user of `cluster` can meet. Every one is a `ClusterError` and pickles across processes.

ClusterError
├── ConnectError     the cluster cannot be reached, or this process cannot join it
├── TokenError       the cluster's token is missing, refused, or readable by others
├── PortError        a port that was asked for is in use
├── ResourceError    the layout asks for more than the cluster has
│   └── OutOfMemoryError   a worker ran out of memory, and again with a smaller share of the work
├── JobError         work sent to the cluster was lost, or its submission failed
├── ServeError       an endpoint cannot be deployed or reached
├── TrainError       a training worker failed for good, or the loss is no longer finite
├── DataError        a row without its field, an empty data set, duplicates
├── DamagedError     what an earlier stage left in the store is damaged
├── StorageError     the object store refuses, or does not answer
└── ModelError       a model that is missing, or of an architecture nobody here knows
"""


class ClusterError(Exception):
    """Base of every error of this package; the message says what, got, allowed and remedy."""


class ConnectError(ClusterError):
    """The cluster cannot be reached or started, or this process cannot join it."""


class TokenError(ClusterError):
    """The token is missing, empty, refused by the cluster, or its file is readable by others."""


class PortError(ClusterError):
    """A port that was asked for by number is in use."""


class ResourceError(ClusterError):
    """A layout or a task asks for more CPUs, GPUs or memory than the cluster has."""


class OutOfMemoryError(ResourceError):
    """A worker ran out of memory, and again with a smaller share of the work."""


class JobError(ClusterError):
    """Work sent to the cluster was lost with its worker or node, or a submission failed."""


class ServeError(ClusterError):
    """An endpoint cannot be deployed, updated or reached."""


class TrainError(ClusterError):
    """A training worker failed beyond its retries, or the loss is no longer finite."""


class DataError(ClusterError):
    """A row without its field, an empty data set, or duplicates where none may be."""


class DamagedError(ClusterError):
    """A file that an earlier stage left in the store is damaged."""


class StorageError(ClusterError):
    """The object store refuses (no bucket, no permission), or does not answer."""


class ModelError(ClusterError):
    """A model is missing, or its architecture is not supported."""
