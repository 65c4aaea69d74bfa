"""One line of JSON a measurement, with everything that was measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

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
        with self.path.open("ab+") as file:
            line = measurement.to_json() + "\n"
            file.write((line if _ends_a_line(file) else "\n" + line).encode())


def _ends_a_line(file: BinaryIO) -> bool:
    """Whether it is empty or ends with a whole line, which a killed run may have cut."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
