"""The fields of KubeRay's objects that docker/kuberay uses, and no other.

Names, types and meaning are those of KubeRay's API reference (docs.ray.io, "KubeRay CRD API reference", ray.io/v1,
operator 1.6); the pod templates in them are Kubernetes' own and are validated by its schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

#: Values of `rayStartParams` are strings; KubeRay makes `--key=value` of each.
StartParams = dict[str, Annotated[str, StringConstraints(strict=True)]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(Strict):
    """Kubernetes' ObjectMeta; KubeRay makes names of pods of the name, so it must be short."""

    name: Annotated[str, StringConstraints(max_length=50, pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$")]


class AuthOptions(Strict):
    """API reference, AuthOptions: `mode` since operator 1.5.1, `secretName` since 1.6.0 (its key is `auth_token`)."""

    mode: Literal["token"]
    secretName: str


class HeadGroupSpec(Strict):
    """API reference, HeadGroupSpec."""

    rayStartParams: StartParams
    template: dict[str, Any]


class WorkerGroupSpec(Strict):
    """API reference, WorkerGroupSpec; without autoscaling the operator wants both bounds."""

    groupName: str
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=0)]
    rayStartParams: StartParams
    template: dict[str, Any]

    @model_validator(mode="after")
    def bounds(self) -> WorkerGroupSpec:
        assert self.minReplicas <= self.replicas <= self.maxReplicas
        return self


class RayClusterSpec(Strict):
    """API reference, RayClusterSpec; token authentication wants `rayVersion` of 2.52 or later."""

    rayVersion: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: AuthOptions
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: Annotated[list[WorkerGroupSpec], Field(min_length=1)]


class RayCluster(Strict):
    """API reference, RayCluster."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJobSpec(Strict):
    """API reference, RayJobSpec. A job on a selected cluster leaves it running and takes no backoffLimit."""

    clusterSelector: dict[Literal["ray.io/cluster"], str]
    submissionMode: Literal["HTTPMode"]
    entrypoint: str


class RayJob(Strict):
    """API reference, RayJob."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayServiceSpec(Strict):
    """API reference, RayServiceSpec; `serveConfigV2` is the YAML text of Serve's multi-application configuration."""

    serveConfigV2: str
    rayClusterConfig: RayClusterSpec


class RayService(Strict):
    """API reference, RayService."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


KINDS: dict[str, type[RayCluster | RayJob | RayService]] = {
    "RayCluster": RayCluster,
    "RayJob": RayJob,
    "RayService": RayService,
}
