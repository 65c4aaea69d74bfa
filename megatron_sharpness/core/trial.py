"""A training that writes down what it is after each iteration, to be compared with others.

``megatron-sharpness verify`` starts the same training several times and asks for it through the
environment.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

#: The environment variable that asks for it; its value is :class:`Trial` as JSON.
VARIABLE = "CRITICAL_SHARPNESS_TRIAL"


@dataclass(frozen=True)
class Trial:
    """What a training is to do beside training.

    Attributes:
        folder: where it writes; seen from all ranks.
        every: measure at the iterations that this number divides; 0 is not at all.
        iterations: how many it makes, from wherever it begins, and then ends.
    """

    folder: Path
    every: int
    iterations: int

    @classmethod
    def asked_for(cls) -> Trial | None:
        """By the environment, if so."""
        if not (text := os.environ.get(VARIABLE)):
            return None
        given = json.loads(text)
        return cls(Path(given["folder"]), given["every"], given["iterations"])

    def environment(self) -> dict[str, str]:
        """What asks a process for it, and those that it starts."""
        return {VARIABLE: json.dumps({**asdict(self), "folder": str(self.folder)})}

    @property
    def log(self) -> Path:
        """Where the measurements go."""
        return self.folder / "critical_sharpness.jsonl"
