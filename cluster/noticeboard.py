"""What the driver and the workers of one training launch tell each other: small files that every node sees."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.durable import write_json
from cluster.objects import Mirror


@dataclass(frozen=True)
class Noticeboard:
    """Notes in a directory on shared storage, or in the object store that it mirrors."""

    directory: Path
    mirror: Mirror | None = None

    def post(self, name: str, value: Any) -> None:
        """Put up a note, or another text for it.

        Raises:
            StorageError: the object store refuses.
        """
        write_json(self.directory / name, value)
        if self.mirror is not None:
            self.mirror.put(self.directory / name, self.directory / name)

    def has(self, name: str) -> bool:
        """Whether a note is up.

        Raises:
            StorageError: the object store refuses.
        """
        if (self.directory / name).exists():
            return True
        return self.mirror is not None and self.mirror.size(self.directory / name) is not None

    def notes(self, start: str) -> list[dict[str, Any]]:
        """Every note whose name begins so, by name; torn ones are passed over.

        Raises:
            StorageError: the object store refuses.
        """
        if self.mirror is not None:
            for name in self.mirror.names(self.directory):
                if name.startswith(start) and not (self.directory / name).is_file():
                    self.mirror.pull(self.directory / name)
        found = []
        for path in sorted(self.directory.glob(f"{start}*.json")):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_text()))
        return found
