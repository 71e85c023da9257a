"""Compile the C source of this package once per machine, and load it; or say that there is no kernel.

The library lies in the user's cache directory under a hash of source, flags, compiler and CPU, written to a temporary
name and renamed, so that processes that start at the same time each find a whole file. Without a compiler, or with
RANKLINE_KERNEL=0, callers take their torch or numpy path: the same result to rounding, slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_DIRECTORY = Path(__file__).parent
_SOURCES = (
    *("packed.c", "products.c", "ratings.c", "nf4.c", "grouped.c", "dense.c", "attend.c", "kronecker.c"),
    "threads.c",
)
_HEADERS = ("threads.h", "tokens.h")
# Not -ffast-math: it would switch the whole process to flushing subnormal numbers.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
_SHARED = ("-shared", "-fPIC", "-std=gnu11", "-pthread", "-fopenmp")
_COMPILE_S = 120
_log = logging.getLogger(__name__)


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled row loops, or None where they cannot be had or RANKLINE_KERNEL is 0."""
    if os.environ.get("RANKLINE_KERNEL") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        _log.info("no C compiler: sparse rows and small systems take the slower numpy path")
        return None
    try:
        return _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("the compiled kernel is not available (%s): taking the slower numpy path", error)
        return None


def cache_directory() -> Path:
    """Where compiled kernels are kept: RANKLINE_CACHE, else `rankline` in the user's cache directory."""
    given = os.environ.get("RANKLINE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(given) if given else Path(home) / "rankline"


def _load(compiler: str) -> ctypes.CDLL:
    name = f"kernel-{_key(compiler)}.so"
    try:
        directory = cache_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / name
        if not path.is_file():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except OSError:
        # No cache to write to, or a damaged file in it: the library stays loaded after its file is gone.
        with tempfile.TemporaryDirectory() as private:
            path = Path(private) / name
            _compile(compiler, path)
            return ctypes.CDLL(str(path))


def _compile(compiler: str, path: Path) -> None:
    """Write the library to `path` in one step."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, *_SHARED, "-o", temporary, *(str(_DIRECTORY / name) for name in _SOURCES), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_COMPILE_S, check=True).stdout
    parts = [
        *((_DIRECTORY / name).read_bytes() for name in (*_SOURCES, *_HEADERS)),
        version,
        _cpu(),
        " ".join((*_FLAGS, *_SHARED)).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return "\n".join([platform.machine(), platform.processor(), *found]).encode()
