"""One line of JSON a measurement, with everything that was measured."""

from __future__ import annotations

from pathlib import Path

from megatron_sharpness.core.measurement import Measurement


class JsonLinesSink:
    """Appends to a file, which is opened for each record: it survives being moved or deleted.

    A run that is resumed from an earlier checkpoint appends iterations that the file has already;
    readers take the last record of an iteration. Folders are made as needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, measurement: Measurement) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(measurement.to_json() + "\n")
