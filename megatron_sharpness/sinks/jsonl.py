"""One line of JSON a measurement, with everything that was measured."""

from __future__ import annotations

from pathlib import Path

from megatron_sharpness.measurement import Measurement


class JsonLinesSink:
    """Appends to a file, which is opened for each record: it survives being moved or deleted.

    A run that is resumed from an earlier checkpoint appends iterations that the file has already;
    readers take the last record of an iteration.

    Raises:
        OSError: the file cannot be created or appended to. The folder is made if need be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.open("a").close()

    def write(self, measurement: Measurement) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(measurement.to_json() + "\n")
