"""Whether `store.path` and `store.lease` can be read at all, and hold nothing that must not be written down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

#: Object stores that pyarrow opens by URI.
SCHEMES = ("s3", "gs", "gcs", "file")
_SECRET = re.compile(r"[?&][^=&]*(password|passwd|pwd|secret|token|access_key)[^=&]*=", re.IGNORECASE)


def is_uri(path: str) -> bool:
    """Whether `store.path` names an object store and no directory."""
    return "://" in path


def store_problems(path: str, lease: str | None) -> Iterator[str]:
    """What is wrong with the two, one message each; what they hold is not repeated, it may be a secret."""
    if is_uri(path):
        yield from _path_problems(path)
    if lease is not None:
        if "://" not in lease:
            yield "store.lease: is no SQLAlchemy URL. Allowed is, for example, postgresql+psycopg2://USER@HOST/NAME."
        elif _SECRET.search(lease) or re.search(r"://[^/@]*:[^/@]*@", lease):
            yield (
                "store.lease: holds a password, which would stand in the run's files. Leave it out: set PGPASSWORD or "
                "~/.pgpass, or what your database's driver reads."
            )


def _path_problems(path: str) -> Iterator[str]:
    try:
        parts = urlsplit(path)
        user = parts.username or parts.password
    except ValueError as error:
        yield f"store.path: is no URI ({error}). Allowed are a directory and s3://BUCKET/PREFIX."
        return
    if (user is not None and (parts.scheme, user) != ("gs", "anonymous")) or _SECRET.search(path):
        yield (
            "store.path: holds credentials, which would stand in the run's files. Leave them out: set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, for gs:// GOOGLE_APPLICATION_CREDENTIALS, on "
            "every node."
        )
    elif parts.scheme not in SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        yield f"store.path: got {parts.scheme}://; allowed are a directory and {allowed}."
    elif not (parts.netloc or parts.scheme == "file") or not parts.path.strip("/"):
        yield "store.path: names no bucket or no prefix in it. Give, for example, s3://BUCKET/PREFIX."
