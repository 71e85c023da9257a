"""The `rankline` command: parses arguments, runs one command, maps errors to exit codes.

Exit codes: 0 done; 1 bug; 2 configuration, token or port; 3 weights, artifacts or disk; 4 cluster, MLflow or Serve;
5 training, numerics or gate; 130 interrupted. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="rankline",
        description="From a pretrained transformer to a served, fine-tuned adapter, in one durable line.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_pipeline_commands(commands)
    _add_store_commands(commands)
    _add_chat(commands)
    _add_spectrum(commands)
    _add_export(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_pipeline_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    texts = {
        "plan": "show stages, keys, what is cached, refusals and estimates; changes nothing",
        "run": "run a pipeline, or go on where it was left",
        "submit": "run a pipeline as a job of a Ray cluster",
    }
    for name, text in texts.items():
        command = _command(commands, name, text)
        command.add_argument(
            "pipeline", nargs="?" if name == "plan" else None, help="pipeline YAML, or its URI in an object store"
        )
        command.add_argument(
            "--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE", help="override a setting"
        )
        command.add_argument("--store", help="directory or URI of the store (store.path)")
        command.add_argument("--cache", help="of a store by URI: local directory of what was read (store.cache)")
        if name == "plan":
            command.add_argument("--schema", action="store_true", help="print the JSON schema of a pipeline YAML")
            _add_scale(command)
        if name == "run":
            command.add_argument("--address", help="a running Ray cluster, HOST:PORT (cluster.address)")
            command.add_argument("--quiet", action="store_true", help="no progress")
            command.add_argument("--log-json", action="store_true", help="progress as JSON on stderr, a line per unit")
            command.add_argument("--verify", action="store_true", help="hash everything that was made before again")
        if name == "submit":
            command.add_argument("--address", required=True, help="dashboard of the cluster, http://HOST:8265")
            way = command.add_mutually_exclusive_group()
            way.add_argument("--no-follow", dest="follow", action="store_false", help="return once it is submitted")
            way.add_argument("--status", action="store_true", help="show this run's submissions, submit nothing")
            way.add_argument("--logs", action="store_true", help="print what the newest submission has printed")
            way.add_argument("--cancel", action="store_true", help="stop the live submission; what is committed stays")


def _add_scale(command: argparse.ArgumentParser) -> None:
    """What `plan` needs to know for a model and a cluster that are not there."""
    scale = command.add_argument_group("on paper", "memory, bytes and time from a model's config.json, without weights")
    scale.add_argument("--model-config", metavar="JSON", help="config.json of a Hugging Face model")
    scale.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    scale.add_argument("--gpus-per-node", type=int, metavar="G", help="0 trains on cores (default: 8, or 0 for cpu)")
    scale.add_argument("--device", default="h100", help="h100, h200, a100, l40s, cpu, or a file of figures (h100)")
    scale.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU (default: the device's)")
    scale.add_argument("--train-rows", type=int, metavar="ROWS", help="training rows (default: 10000)")
    scale.add_argument("--heldout-rows", type=int, metavar="ROWS", help="held-out rows (default: 1000)")
    scale.add_argument("--tokens-per-row", type=float, metavar="T", help="tokens of a row (default: data.max_length)")


def _add_store_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    texts = {
        "status": "show runs, stages, cluster and endpoint",
        "resume": "go on with a stored run; refuses when its inputs have changed",
        "serve": "deploy the endpoint of a finished run again",
        "stop": "end the endpoint and the embedded cluster of a store",
        "ui": "open MLflow's page on the store's runs",
        "verify": "hash everything again that a run's stages have left, and name the damaged files",
        "gc": "show what no run and no registered version needs, and how much room it takes",
        "methods": "list decompositions, quantizations and adapters",
        "doctor": "check this machine and the store, with a remedy for each finding",
    }
    for name, text in texts.items():
        command = _command(commands, name, text)
        if name in ("status", "resume", "serve", "verify"):
            command.add_argument("run", nargs="?" if name == "status" else None, help="name of the run")
        if name != "methods":
            _add_store(command)
        if name == "serve":
            command.add_argument(
                "--build",
                metavar="FILE",
                help="write a configuration for `serve deploy` and RayService, deploy nothing",
            )
        if name == "gc":
            command.add_argument("--delete", action="store_true", help="remove it")
        if name == "doctor":
            command.add_argument("--address", metavar="HOST:PORT", help="ask the nodes of this Ray cluster too")
        if name == "ui":
            command.add_argument("--port", type=int, default=5000, help="port on loopback (default: 5000)")


def _add_store(command: argparse.ArgumentParser) -> None:
    command.add_argument("--store", default="runs", help="directory or URI of the store (default: runs)")
    command.add_argument("--cache", help="of a store by URI: local directory of what was read")


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _command(commands, "chat", "talk to the endpoint in the terminal, or answer one message")
    command.add_argument("model", nargs="?", help="model id (default: the first adapter of the endpoint, or its base)")
    command.add_argument("-m", "--message", metavar="TEXT", help="print the answer to this and exit")
    command.add_argument("--system", metavar="TEXT", help="system message")
    command.add_argument("--max-tokens", type=int, metavar="N", help="tokens of an answer (default: the endpoint's)")
    command.add_argument("--temperature", type=float, metavar="T", help="0 to 2, 0 is greedy (default: the endpoint's)")
    command.add_argument("--url", help="endpoint, http://HOST:PORT (default: that of the store's newest run)")
    command.add_argument("--token-file", metavar="FILE", help="file with its token (default: as the run recorded it)")
    _add_store(command)


def _add_spectrum(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _command(commands, "spectrum", "show singular values, stable ranks and energies of a model's weights")
    command.add_argument("model", help="directory, .gguf file, package:NAME or hub:OWNER/NAME (model.source)")
    command.add_argument("--out", default="spectrum.png", metavar="PNG", help="picture (default: spectrum.png)")
    command.add_argument("--top", type=int, default=10, metavar="N", help="list N weights, 0 for all (default: 10)")
    command.add_argument(
        "--budget", type=float, metavar="SHARE", help="show the ranks for this share of the parameters, such as 0.25"
    )
    command.add_argument(
        "--target", dest="targets", action="append", metavar="NAME", help="only these modules (default: all-linear)"
    )


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _command(commands, "export", "write the adapter of a finished run as LoRA, or merged into a model")
    command.add_argument("run", help="name of the run")
    command.add_argument("--out", required=True, metavar="DIR", help="new directory")
    command.add_argument(
        "--format",
        choices=("lora", "merged"),
        default="lora",
        help="lora: over the original model, for PEFT and vLLM (default); merged: a model that transformers loads",
    )
    command.add_argument("--max-rank", type=int, metavar="R", help="cut the LoRA of every layer to this rank")
    command.add_argument(
        "--onto",
        choices=("trained", "original"),
        default="trained",
        help="merged: into the dequantized base that was trained over (default: what is served), or the original",
    )
    _add_store(command)


def entry() -> NoReturn:
    """The console script: exit with the code of `main`; a Ctrl-C pressed while Python ends leaves at once."""
    try:
        code = main()
    except KeyboardInterrupt:  # pressed once more while the first was being told of
        from pipelines.errors import INTERRUPTED

        code = INTERRUPTED

    def leave(_signal: int, _frame: FrameType | None) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    signal.signal(signal.SIGINT, leave)
    if any(thread.name == "rankline-train" for thread in threading.enumerate()):
        leave(0, None)  # Ray's exit hook would end a process in which `cluster.trainer` still asks it, with code 1
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        from importlib import metadata

        print(metadata.version("rankline"))
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from pipelines import commands

    try:
        return int(getattr(commands, arguments.command)(arguments))
    except BrokenPipeError:  # `rankline status | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the interpreter flushes it at exit
        return 0
    except (Exception, KeyboardInterrupt) as error:
        from pipelines.errors import exit_code

        if arguments.debug:
            raise
        code = exit_code(error)
        _explain(error, code, arguments)
        return code


def _explain(error: BaseException, code: int, arguments: argparse.Namespace) -> None:
    """The message without a traceback, then the command that goes on; with `--json` both also as one document."""
    from pipelines.errors import BUG, CONFIG, explain

    text = explain(error, code)
    goes_on = _again(arguments) if arguments.command in ("run", "resume") and code not in (BUG, CONFIG) else None
    if arguments.json:
        import json

        print(json.dumps({"error": text, "exit_code": code, "goes_on": goes_on}, indent=2))
    print(f"rankline {arguments.command}: {text}", file=sys.stderr)
    if goes_on:
        print(f"Go on with: {goes_on}", file=sys.stderr)


def _again(arguments: argparse.Namespace) -> str:
    """The command line that was given, to be copied."""
    import shlex

    if arguments.command == "resume":
        cache = ["--cache", arguments.cache] if arguments.cache else []
        return shlex.join(["rankline", "resume", arguments.run, "--store", arguments.store, *cache])
    words = ["rankline", "run", arguments.pipeline]
    for option, values in (
        ("--set", arguments.overrides),
        ("--store", [arguments.store]),
        ("--cache", [arguments.cache]),
        ("--address", [arguments.address]),
    ):
        words += [word for value in values if value for word in (option, value)]
    return shlex.join(words)


if __name__ == "__main__":
    entry()
