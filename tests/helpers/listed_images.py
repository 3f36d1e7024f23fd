"""A source of noise images held in memory, importable by the pipeline's worker processes."""

import io

import numpy as np
from PIL import Image


class ListSource:
    """Noise images of different sizes, label = 2 id + 1; those of `corrupt` cannot be decoded."""

    name, split, num_classes, class_names = "list", "train", 0, ()

    def __init__(self, count, corrupt=()):
        self._encoded = []
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (11 + i, 29 - i % 13, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            self._encoded.append(buffer.getvalue()[: 40 if i in corrupt else None])

    def __len__(self):
        return len(self._encoded)

    def __getitem__(self, i):
        return {"image": self._encoded[i], "label": 2 * i + 1, "example_id": i, "where": f"list/{i}"}
