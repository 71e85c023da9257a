"""One function per command of `rankline`; each takes the parsed arguments and returns the exit code."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import PipelineConfig, json_schema, parse, read_yaml
from pipelines.errors import DONE, WEIGHTS, ConfigError, exit_code
from pipelines.portable import read_pipeline

if TYPE_CHECKING:
    from pipelines.artifacts import Store


def _load(arguments: Namespace) -> PipelineConfig:
    overrides = list(arguments.overrides)
    if arguments.store:
        overrides.append(f"store.path={json.dumps(arguments.store)}")  # a URI may hold what YAML takes for its own
    if arguments.cache:
        overrides.append(f"store.cache={json.dumps(arguments.cache)}")
    if arguments.command == "run" and arguments.address:
        overrides.append(f"cluster.address={arguments.address}")
    return parse(read_pipeline(arguments.pipeline), overrides)


def _store(arguments: Namespace) -> Store:
    """The store that the arguments name."""
    from pipelines.artifacts import Store
    from pipelines.config import StoreConfig, refuse_store

    refuse_store(StoreConfig(path=arguments.store, cache=arguments.cache))
    return Store.open(arguments.store, arguments.cache)


def _json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def plan(arguments: Namespace) -> int:
    """`rankline plan`: exit 0 when nothing refuses, else the code of the first refusal."""
    from pipelines import preflight, show

    if arguments.schema:
        _json(json_schema())
        return DONE
    if arguments.model_config:
        return _plan_scale(arguments)
    if not arguments.pipeline:
        raise ConfigError("plan: give a pipeline YAML (or --schema, or --model-config).")
    config = _load(arguments)
    result = preflight.plan(config)
    errors = result.pop("refusal_errors")
    if config.cluster.address and not errors:
        from pipelines.session import node_refusals

        errors += node_refusals(config, [stage["name"] for stage in result["stages"] if not stage["cached"]])
        result["refusals"] = [str(error) for error in errors]
    _json(result) if arguments.json else show.plan(result)
    return exit_code(errors[0]) if errors else DONE


def _plan_scale(arguments: Namespace) -> int:
    """`rankline plan --model-config`: exit 0 also where a rank does not fit; that is what was asked."""
    from pipelines import scale, scale_view

    config = _load(arguments) if arguments.pipeline else None
    gpus = arguments.gpus_per_node
    result = scale.plan_from_files(
        config,
        Path(arguments.model_config).expanduser(),
        nodes=arguments.nodes,
        gpus_per_node=(0 if arguments.device == "cpu" else 8) if gpus is None else gpus,
        device=arguments.device,
        gpu_memory_gib=arguments.gpu_memory,
        rows=scale.rows_of(config, arguments.train_rows, arguments.heldout_rows, arguments.tokens_per_row),
    )
    _json(result) if arguments.json else scale_view.show(result)
    return DONE


def run(arguments: Namespace) -> int:
    """`rankline run`."""
    from pipelines import show, workflow

    quiet = arguments.quiet or arguments.json
    result = workflow.run(_load(arguments), quiet=quiet, verify=arguments.verify, log_json=arguments.log_json)
    _json(result.summary) if arguments.json else show.result(result)
    return DONE


def resume(arguments: Namespace) -> int:
    """`rankline resume RUN`: the stored YAML as it is; refuses when its sources give other keys."""
    from pipelines import show, workflow
    from pipelines.sources import hash_sources

    store = _store(arguments)
    directory = store.run_dir(arguments.run)
    record = store.read_record(arguments.run)
    if "keys" not in record:
        raise ConfigError(
            f"resume {arguments.run!r}: no such run in {store.name}, or its run.json is damaged. `rankline status` "
            f"lists the runs; `rankline run` with {directory / 'pipeline.yaml'} goes on with a damaged one."
        )
    here = [] if store.mirror is None else [f"store.path={json.dumps(arguments.store)}"]
    here += [f"store.cache={json.dumps(str(store.root))}"] if store.mirror is not None else []
    config = parse(read_yaml(store.obtain(directory / "pipeline.yaml")), here)
    keys = workflow.stage_keys(config, hash_sources(config, store.root / "_hashes.json"))
    changed = [stage for stage, key in keys.items() if record["keys"].get(stage) != key]
    if changed:
        raise ConfigError(
            f"resume {arguments.run!r}: the model, the data or {directory / 'pipeline.yaml'} changed since the run was "
            f"started (first at stage {changed[0]}). Use `rankline run` with your pipeline YAML to run the changed one."
        )
    result = workflow.run(config, quiet=arguments.json)
    _json(result.summary) if arguments.json else show.result(result)
    return DONE


def submit(arguments: Namespace) -> int:
    """`rankline submit`: the same YAML as a job of a Ray cluster, idempotent by run key; or a look at that job."""
    from pipelines import remote

    config, address = _load(arguments), arguments.address
    if arguments.status:
        found = remote.attempts(config, address)
        lines = [f"{one['submission_id']}: {one['status']}  {one['message']}".rstrip() for one in found]
        _json(found) if arguments.json else print("\n".join(lines) or "never submitted there")
        return DONE
    if arguments.logs:
        outcome = remote.logs(config, address)
        _json(outcome) if arguments.json else print(outcome["log"], end="")
        return DONE
    outcome = remote.cancel(config, address) if arguments.cancel else remote.submit(config, address, arguments.follow)
    _json(outcome) if arguments.json else print(f"{outcome['submission_id']}: {outcome['status']}")
    return int(outcome.get("exit_code", DONE))


def status(arguments: Namespace) -> int:
    """`rankline status [RUN]`."""
    from pipelines import inspect_store, show

    found = inspect_store.status(_store(arguments), arguments.run)
    _json(found) if arguments.json else show.status(found)
    return DONE


def serve(arguments: Namespace) -> int:
    """`rankline serve RUN`: deploy the registered version of a finished run, or write what others deploy it by."""
    from pipelines import endpoint, show
    from pipelines.serve_app import redeploy, serve_yaml

    if arguments.build:
        Path(arguments.build).write_text(serve_yaml(_store(arguments), arguments.run))
        _json({"written": arguments.build}) if arguments.json else print(f"written: {arguments.build}")
        return DONE
    deployed, name = redeploy(_store(arguments), arguments.run)
    if arguments.json:
        _json(deployed)
    else:
        show.endpoint(deployed, name, endpoint.curl(deployed, name))
    return DONE


def verify(arguments: Namespace) -> int:
    """`rankline verify RUN`: exit 0 when everything is whole, else 3."""
    from pipelines import maintenance, show

    found = maintenance.verify(_store(arguments), arguments.run)
    _json(found) if arguments.json else show.verified(found)
    sys.stdout.flush()
    return WEIGHTS if found["problems"] else DONE


def gc(arguments: Namespace) -> int:
    """`rankline gc`: a list; with `--delete` what is on it goes."""
    from pipelines import maintenance, show

    store = _store(arguments)
    found = maintenance.collect(store) if arguments.delete else maintenance.garbage(store)
    if arguments.json:
        _json({"deleted": arguments.delete, "bytes": sum(one.num_bytes for one in found),
               "garbage": [asdict(one) for one in found]})  # fmt: skip
    else:
        show.garbage(found, arguments.delete)
    return DONE


def stop(arguments: Namespace) -> int:
    """`rankline stop`: the embedded cluster of a store with its endpoint."""
    from cluster import session

    stopped = session.stop(_store(arguments).root)
    if arguments.json:
        _json({"stopped": stopped})
    else:
        print("stopped the endpoint and its cluster" if stopped else "nothing was running")
    return DONE


def ui(arguments: Namespace) -> int:
    """`rankline ui`: MLflow's own server on loopback, until Ctrl-C; or where the server is that keeps the runs."""
    from pipelines import mlflow_ui

    def ready(url: str, ours: bool) -> None:
        if arguments.json:
            _json({"url": url})
        else:
            print(f"MLflow on {url}  (Ctrl-C ends it)" if ours else f"MLflow on {url}")
        sys.stdout.flush()

    return mlflow_ui.serve(_store(arguments), arguments.port, ready)


def chat(arguments: Namespace) -> int:
    """`rankline chat [MODEL]`: one answer to `-m` or to stdin, else a conversation."""
    from pipelines import chat as chats
    from pipelines.chat_client import find

    options = chats.check_options(arguments.max_tokens, arguments.temperature)
    message = chats.find_message(arguments.message, arguments.json)
    client = find(_store(arguments), arguments.url, arguments.token_file)
    talk = chats.Chat(client, client.choose(arguments.model), arguments.system, options)
    if message is None:
        talk.converse(chats.terminal_lines())
        return DONE
    answer = talk.once(message, quiet=arguments.json)
    if arguments.json:
        _json(asdict(answer) | {"tokens_per_s": answer.tokens_per_s})
    return DONE


def methods(arguments: Namespace) -> int:
    """`rankline methods`."""
    from pipelines import inspect_store, show

    found = inspect_store.methods()
    _json(found) if arguments.json else show.methods(found)
    return DONE


def spectrum(arguments: Namespace) -> int:
    """`rankline spectrum MODEL`: tables, a picture and, with a budget, ranks."""
    from pipelines import spectrum as spectra
    from pipelines import spectrum_view

    out = Path(arguments.out).expanduser()
    spectra.check_options(arguments.budget, arguments.top)
    spectrum_view.check_picture(out)
    weights = spectra.measure(arguments.model, arguments.targets or "all-linear", quiet=arguments.json)
    report = spectra.report(arguments.model, weights, arguments.budget)
    spectrum_view.picture(weights, out)
    if arguments.json:
        _json(report | {"picture": str(out)})
    else:
        spectrum_view.tables(report, arguments.top)
        print(f"picture   {out}")
    return DONE


def export(arguments: Namespace) -> int:
    """`rankline export RUN --out DIR`."""
    from pipelines import export as exports
    from pipelines import show

    store, out = _store(arguments), Path(arguments.out).expanduser().resolve()
    facts = exports.export(store, arguments.run, out, arguments.format, arguments.max_rank, arguments.onto)
    _json(facts) if arguments.json else show.exported(facts)
    return DONE


def doctor(arguments: Namespace) -> int:
    """`rankline doctor`: exit 0 when every check passes or only warns, else 2."""
    from pipelines import doctor as checks
    from pipelines import show

    found = checks.examine(_store(arguments), arguments.address)
    _json(found) if arguments.json else show.doctor(found)
    sys.stdout.flush()
    return 2 if any(check["state"] == "fail" for check in found) else DONE
