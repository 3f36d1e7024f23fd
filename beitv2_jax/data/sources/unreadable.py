"""What a source gives in place of an example whose file or record cannot be read: the fault instead of an image."""

import pathlib
from typing import Any

import numpy as np

from beitv2_jax.data.array_files import RecordError
from beitv2_jax.runtime import open_files


def unreadable(example_id: int, where: str, cause: object, num_labels: int = 0) -> dict[str, Any]:
    """Return the placeholder of an example that cannot be read; `fault` is the reason.

    `num_labels` is the number of classes of a multi-label source, 0 of any other.
    """
    label = np.zeros(num_labels, np.float32) if num_labels else -1
    return {"image": b"", "label": label, "example_id": int(example_id), "where": where, "fault": str(cause)}


def file_bytes(path: pathlib.Path) -> bytes:
    """Return the bytes of a file.

    Raises:
      RecordError: it is gone, or cannot be read.
      UserError: the system lets this process open no more files.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        if open_files.is_exhausted(error):
            raise open_files.too_many(error) from error
        raise RecordError(error.strerror or str(error)) from error
