"""JSON files of dataclasses with arrays, each written whole or not at all."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np


def save_json(content: Any, path: str | os.PathLike) -> None:
    """Write what JSON can hold to a file, whole or not at all.

    Raises:
        FileNotFoundError: the file's folder does not exist.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"No folder {path.parent} to write {path.name} to.")
    text = json.dumps(content, allow_nan=False, indent=1)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_json(path: str | os.PathLike, key: str, version: int, writer: str) -> Any:
    """What `save_json` wrote for `writer`, with the entry `key` equal to `version`.

    Raises:
        ValueError: it is another file.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        found = content[key]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"Expected a file written by {writer}. Received: {path}") from error
    if found != version:
        raise ValueError(
            f"Expected a file of version {version}. Received: version {found} in {path}, "
            "written by another version of keras_rgd."
        )
    return content


def plain(value: Any) -> Any:
    """A field of a record as JSON holds it."""
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value.tolist()]
    # JSON has no NaN.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def revived(cls: type, row: Any, path: str | os.PathLike) -> Any:
    """A record of a dataclass from its fields as `plain` made them.

    Raises:
        ValueError: they are not its fields.
    """
    # Types, and no strings: files of such classes have no `from __future__ import annotations`.
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    try:
        values = {k: math.nan if v is None and kinds[k] is float else v for k, v in row.items()}
        arrays = {k: np.array(values[k], np.float64) for k in kinds if kinds[k] is np.ndarray}
        return cls(**values | arrays)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"Expected the fields of {cls.__name__}. Received: {path}: {error!r}"
        ) from error
