"""Text files that are whole or not there (floor 0)."""

import os
import uuid
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a name of its own and rename it: nobody sees half of it, several may write it at once."""
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "w") as file:
        file.write(text)
    os.replace(temporary, path)
