"""What begins each object of an answer."""

from __future__ import annotations

import time
import uuid
from typing import Any

from arriero import __version__


class Head:
    """Id, time and model of one answer, the same in all of its pieces."""

    def __init__(self, prefix: str, model: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.model, self.created = model, int(time.time())

    def fields(self, kind: str) -> dict[str, Any]:
        """The fields, with the kind of object."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"arriero-{__version__}",
        }
