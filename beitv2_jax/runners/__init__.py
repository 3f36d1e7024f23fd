"""Which stage runs, and how: pipelines, target caches, verification, probe and segmentation."""
