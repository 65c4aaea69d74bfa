"""What is in a run's checkpoints, in whichever format, but for what is of the measurement."""

from __future__ import annotations

import hashlib
import io
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.digest import hash_of

#: Arguments that are another in a run that measures: its flags and state, and where it logs.
OWN = re.compile("critical_sharpness|tensorboard_dir")


def contents(folder: Path) -> dict[str, str]:
    """Name of each tensor and value, with its checkpoint's, → hash."""
    return {
        f"{path.name}: {name}": value
        for path in sorted(folder.glob("iter_*"))
        for name, value in [*_distributed(path), *_pickled(path)]
    }


def _distributed(folder: Path) -> Iterator[tuple[str, str]]:
    """Parts of tensors and pickled values, as they lie in PyTorch's distributed checkpoints."""
    if not (folder / ".metadata").exists():
        return
    metadata = FileSystemReader(folder).read_metadata()
    for index, place in metadata.storage_data.items():
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        if isinstance(metadata.state_dict_metadata[index.fqn], TensorStorageMetadata):
            yield f"{index.fqn} {[*(index.offset or ())]}", hashlib.sha256(data).hexdigest()
        else:
            yield from _leaves(index.fqn, _load(io.BytesIO(data)))


def _pickled(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("**/*.pt")):
        yield from _leaves(str(path.relative_to(folder)), _load(path))


def _load(file: Any) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Namespace):
        value = {key: each for key, each in vars(value).items() if not OWN.search(key)}
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield name, hash_of(value)
        return
    for key, each in value.items():
        yield from _leaves(f"{name}.{key}", each)
