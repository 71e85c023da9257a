"""The endpoint of a finished run again: by us, or by Ray Serve's own tools (`serve deploy serve.yaml`, RayService).

`rankline serve RUN --build serve.yaml` writes the file. It names the store and the run; `build` reads them on the
cluster, where the store must lie under the same path.
"""

from __future__ import annotations

import time
from typing import Any

from cluster.serving.auth import check_exposure, ensure_token, is_loopback
from cluster.serving.deploy import ROUTE_PREFIX, application, deployment_options
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig, parse, read_yaml
from pipelines.endpoint import check_served, deploy_endpoint, serve_spec
from pipelines.errors import ConfigError
from pipelines.session import open_cluster
from pipelines.tracking import Tracker, default_uri


def redeploy(store: Store, name: str) -> tuple[dict[str, Any], str]:
    """Deploy the registered version of a finished run again; returns the endpoint and the model's name.

    Raises:
        ConfigError: there is no such run, or it has registered nothing yet.
        ArtifactError: what the replicas would read is damaged.
    """
    config, record, registered = finished_run(store, name)
    open_cluster(config, store.root)
    tracker = Tracker(store.root, config.register.tracking_uri, config.register.experiment)
    endpoint = deploy_endpoint(config, store, record["keys"], registered, tracker)
    store.write_record(name, record | {"endpoint": endpoint, "updated": time.time()})
    return endpoint, registered["name"]


def finished_run(store: Store, name: str) -> tuple[PipelineConfig, dict[str, Any], dict[str, Any]]:
    """Configuration and record of a run that has registered a version, and what that was.

    Raises:
        ConfigError: there is no such run, or it has registered nothing yet.
    """
    record = store.read_record(name)
    key = record.get("keys", {}).get("register")
    manifest = store.read_manifest("register", key) if key else None
    if manifest is None:
        raise ConfigError(
            f"serve {name!r}: no finished run of that name in {store.name}. `rankline status` lists the runs."
        )
    return parse(read_yaml(store.obtain(store.run_dir(name) / "pipeline.yaml"))), record, manifest.facts


def build(args: dict[str, str]) -> Any:
    """The Serve application of `args["run"]` in the store `args["store"]`, mirrored in `args["cache"]`; Serve calls it.

    Raises:
        ConfigError: there is no such run.
        ServeError: the address is not loopback, and the run has no token file of its own.
        TokenError: the token file cannot be used.
        ArtifactError: what the replicas would read is damaged.
    """
    store = Store.open(args["store"], args.get("cache"))
    config, record, registered = finished_run(store, args["run"])
    uri = config.register.tracking_uri or default_uri(store.root)
    spec = serve_spec(config, store, record["keys"], registered, uri)
    check_served(store, record["keys"])
    check_exposure(config.serve.host, config.serve.token_file)
    ensure_token(spec.token_file)
    return application(spec, config.serve)


def serve_yaml(store: Store, name: str) -> str:
    """The text of a Serve configuration file for a run.

    Raises:
        ConfigError: there is no such run, or it has registered nothing yet.
    """
    import yaml

    config, _, registered = finished_run(store, name)
    options = deployment_options(config.serve)
    written = {
        # Reached from outside by KubeRay's service, which sends requests to the workers too.
        "proxy_location": "HeadOnly" if is_loopback(config.serve.host) else "EveryNode",
        "http_options": {"host": config.serve.host, "port": config.serve.port},
        "applications": [
            {
                "name": f"rankline-{config.name}",
                "route_prefix": ROUTE_PREFIX,
                "import_path": f"{__name__}:{build.__name__}",
                "args": {"store": store.name, "run": name}
                | ({} if store.mirror is None else {"cache": str(store.root)}),
                "deployments": [options],
            }
        ],
    }
    head = f"# {registered['name']}:{registered['version']} and every adapter of its registry over the same base.\n"
    return head + str(yaml.safe_dump(written, sort_keys=False))
