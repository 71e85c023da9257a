"""An object store and the directory that mirrors it on each node, through `pyarrow.fs`: S3, GCS, or a file system.

Every object has the name that its mirror has below the local directory. An object is there whole or not at all: a PUT
is atomic, and on a file system a temporary file is renamed. Credentials come from the environment of each node alone.
What fails for a moment is tried again by the store's own client.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.errors import DamagedError, StorageError

_CHUNK = 8 * 2**20
#: How often an object is read that somebody writes over all the time.
_READS = 10
#: What a store is opened with unless its URI says otherwise: on S3 a small object is one PUT, and the client of GCS
#: tries again for seconds, not for 15 minutes.
_OPTIONS = {"s3": "allow_delayed_open=true", "gs": "retry_limit_seconds=10", "gcs": "retry_limit_seconds=10"}
#: What to do about an object that is damaged.
AGAIN = "Delete the stage that holds it and run again: it is made anew."
#: The words by one of which a client says that there is no bucket; of GCS' a write finds all but the bucket.
_NO_BUCKET = r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist|^write .*google::cloud::Status\(NOT_FOUND"
#: (the words by one of which a client says it, what that means and what to do)
_MEANINGS = (
    (_NO_BUCKET,
     "there is no such bucket. Make it, or set store.path"),
    (r"ACCESS_DENIED|AccessDenied|status.{0,6}403\b|INVALID_ACCESS_KEY|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|"
     r"SignatureDoesNotMatch|PermissionDenied|PERMISSION_DENIED|UNAUTHENTICATED|EXPIRED_TOKEN|ExpiredToken",
     "access is refused. Set credentials that may list, read, write and delete there in every node's environment "
     "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS)"),
    (r"OAuth2 access token",
     "no token is to be had. Set GOOGLE_APPLICATION_CREDENTIALS in every node's environment, and check the network"),
    (r"NETWORK_CONNECTION|curlCode|CURL error|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnect|[Tt]imeout|[Tt]imed out",
     "it does not answer. Check the network and endpoint_override in store.path; what is committed stays, resume"),
)  # fmt: skip


@lru_cache(maxsize=16)
def _open(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path of its prefix there."""
    import pyarrow as pa
    from pyarrow import fs

    option = _OPTIONS.get(uri.partition("://")[0], "")
    completed = uri if option.partition("=")[0] in uri else f"{uri}{'&' if '?' in uri else '?'}{option}"
    try:
        filesystem, prefix = fs.FileSystem.from_uri(completed)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise StorageError(f"open the store {plain(uri)}: {error}. Check store.path.") from error
    return filesystem, prefix.rstrip("/")


def plain(uri: str) -> str:
    """A URI as messages show it, without its options."""
    return uri.partition("?")[0].rstrip("/")


@dataclass(frozen=True)
class Mirror:
    """The object store at `uri`, and the directory `root` that mirrors it; small, picklable, the same on every node."""

    uri: str
    root: Path

    @property
    def filesystem(self) -> Any:
        """The store as pyarrow opens it; opened once per process.

        Raises:
            StorageError: the URI is none that pyarrow knows.
        """
        return _open(self.uri)[0]

    def key(self, path: Path) -> str:
        """Where pyarrow finds the object that `path` mirrors."""
        inner = path.relative_to(self.root).as_posix()
        prefix = _open(self.uri)[1]
        return prefix if inner == "." else f"{prefix}/{inner}"

    def url(self, path: Path) -> str:
        """What messages call that object."""
        inner = path.relative_to(self.root).as_posix()
        return plain(self.uri) if inner == "." else f"{plain(self.uri)}/{inner}"

    def uri_of(self, path: Path) -> str:
        """The URI by which anybody opens that object, with the store's options."""
        _, mark, options = self.uri.partition("?")
        return f"{self.url(path)}{mark}{options}"

    @contextlib.contextmanager
    def _telling(self, doing: str, path: Path) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (OSError, pa.ArrowException) as error:
            text = " ".join(str(error).partition(" error_info=")[0].split())
            if isinstance(error, FileNotFoundError) and not re.search(_NO_BUCKET, f"{doing} {text}"):
                raise FileNotFoundError(2, "no such object", self.url(path)) from error
            if isinstance(error, OSError) and error.errno is not None and "google::cloud" not in text:  # a local disk
                raise
            meaning = next((told for words, told in _MEANINGS if re.search(words, f"{doing} {text}")), "it failed")
            said = text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
            raise StorageError(f"{doing} {self.url(path)}: {meaning} ({said}).") from error

    def put(self, path: Path, source: Path | bytes) -> None:
        """Write the object that `path` mirrors, from a local file or from bytes.

        Raises:
            StorageError: it cannot be written.
        """
        with self._telling("write", path):
            if self.filesystem.type_name == "local":
                _put_file(Path(self.key(path)), source)
                return
            # Not in this thread: a stream that Ctrl-C closes half written leaves half an object.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._upload, path, source).result()

    def _upload(self, path: Path, source: Path | bytes) -> None:
        with self.filesystem.open_output_stream(self.key(path)) as sink:
            if isinstance(source, bytes):
                sink.write(source)
            else:
                with source.open("rb") as handle:
                    shutil.copyfileobj(handle, sink, _CHUNK)

    def get(self, path: Path, written_once: bool = False) -> bytes:
        """The bytes of a small object.

        The client asks for the size, then for so many bytes: of an object that is written over meanwhile it may read
        the beginning, so that the size is asked again unless it is `written_once`.

        Raises:
            FileNotFoundError: there is none. StorageError: it cannot be read.
        """
        for _ in range(_READS):
            with self._telling("read", path), self.filesystem.open_input_stream(self.key(path)) as stream:
                data: bytes = stream.read()
            if written_once or self.size(path) == len(data):
                return data
        raise StorageError(f"read {self.url(path)}: it is written over all the time. End what writes it and try again.")

    def get_range(self, path: Path, start: int, length: int) -> bytes:
        """`length` bytes of an object from `start` on, and no more over the network.

        On GCS a request for all of it goes before, which is hung up on: up to a MiB or so is sent for nothing.

        Raises:
            FileNotFoundError, StorageError: as `get`. DamagedError: the object ends before.
        """
        for left in reversed(range(_READS)):
            try:
                with self._telling("read", path), self.filesystem.open_input_file(self.key(path)) as handle:
                    if handle.closed:
                        raise FileNotFoundError
                    data: bytes = handle.read_at(length, start)
                break
            except FileNotFoundError:  # GCS' client asks for the generation that was there when it opened the object
                if not left or self.size(path) is None:
                    raise
        if len(data) != length:
            raise DamagedError(f"read {self.url(path)}: it ends before byte {start + length}.")
        return data

    def pull(self, path: Path, target: Path | None = None, sha256: str | None = None) -> None:
        """Bring an object into the mirror, or to `target`, under a temporary name until its `sha256` is checked.

        Raises:
            FileNotFoundError, StorageError: as `get`. DamagedError: it is not what it was. OSError: the disk refuses.
        """
        from cluster.durable import sync

        target = target or path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as handle:
                for chunk in self._chunks(path):
                    digest.update(chunk)
                    handle.write(chunk)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise DamagedError(f"{self.url(path)} is damaged: its sha256 does not match. {AGAIN}")
            sync(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def digest(self, path: Path) -> tuple[str, int]:
        """sha256 and size of an object, read without keeping it.

        Raises:
            FileNotFoundError, StorageError: as `get`.
        """
        digest, size = hashlib.sha256(), 0
        for chunk in self._chunks(path):
            digest.update(chunk)
            size += len(chunk)
        return digest.hexdigest(), size

    def _chunks(self, path: Path) -> Iterator[bytes]:
        with self._telling("read", path), self.filesystem.open_input_stream(self.key(path)) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    def size(self, path: Path) -> int | None:
        """Bytes of an object; None where there is none.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        with self._telling("look for", path):
            info = self.filesystem.get_file_info(self.key(path))
            return int(info.size) if info.is_file else None

    def names(self, path: Path, directories: bool = False) -> dict[str, int]:
        """Objects (or, with `directories`, prefixes) directly below a path, with their sizes: one request per 1,000.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        from pyarrow import fs

        if directories and self._is_gcs:
            return self._prefixes(path)
        with self._telling("list", path):
            found = self.filesystem.get_file_info(fs.FileSelector(self.key(path), allow_not_found=True))
        kind = fs.FileType.Directory if directories else fs.FileType.File
        named = (info for info in found if info.type == kind and not info.base_name.startswith("."))
        return {info.base_name: int(info.size or 0) for info in named}

    def _prefixes(self, path: Path) -> dict[str, int]:
        """The prefixes below a path by the objects there, each with their size: GCS' client lists no prefixes."""
        start, found = f"{self.key(path)}/", dict[str, int]()
        for info in self._below(path):
            name, inner, _ = info.path.removeprefix(start).partition("/")
            if inner and not name.startswith("."):
                found[name] = found.get(name, 0) + int(info.size or 0)
        return found

    def _below(self, path: Path) -> list[Any]:
        from pyarrow import fs

        with self._telling("list", path):
            below = fs.FileSelector(self.key(path), allow_not_found=True, recursive=True)
            return list(self.filesystem.get_file_info(below))

    @property
    def _is_gcs(self) -> bool:
        return bool(self.filesystem.type_name == "gcs")

    def total(self, path: Path) -> int:
        """Bytes of all objects below a path.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        return sum(int(info.size) for info in self._below(path) if info.is_file)

    def delete(self, path: Path) -> None:
        """Remove an object, if it is there.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        with contextlib.suppress(FileNotFoundError), self._telling("delete", path):
            self.filesystem.delete_file(self.key(path))

    def probe(self) -> None:
        """Write, list, read and remove a marker, as a run will.

        Raises:
            StorageError: one of that is refused, or another text is read.
        """
        marker, secret = self.root / "_probe" / uuid.uuid4().hex, uuid.uuid4().bytes
        self.put(marker, secret)
        try:
            if marker.name not in self.names(marker.parent) or self.get(marker) != secret:
                raise StorageError(f"use {self.url(marker)}: what was written is not what is read.")
        finally:
            self.delete(marker)

    def delete_tree(self, path: Path) -> None:
        """Remove all objects below a path.

        Raises:
            StorageError: the store refuses or does not answer.
        """
        with contextlib.suppress(FileNotFoundError), self._telling("delete", path):
            if self._is_gcs:  # `delete_dir` would go for an object of the directory's own name too
                self.filesystem.delete_dir_contents(self.key(path), missing_dir_ok=True)
            else:
                self.filesystem.delete_dir(self.key(path))


def _put_file(path: Path, source: Path | bytes) -> None:
    """An object of a file system, as durable as a unit of a local store."""
    from cluster.durable import sync, write_atomic

    if isinstance(source, bytes):
        write_atomic(path, source)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        shutil.copyfile(source, temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
