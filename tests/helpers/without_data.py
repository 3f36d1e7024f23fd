"""Stages built without a data set, for tests that bring their own batches or need only shapes."""

import contextlib
import types
from unittest import mock

from beitv2_jax.tasks import inputs, targets


class FakeSource:
    """A data set of which only the description is asked for."""

    name, split, class_names, empty_classes = "fake", "train", (), ()

    def __init__(self, num_classes):
        self.num_classes = num_classes

    def __len__(self):
        return 1_281_167


@contextlib.contextmanager
def no_data(teacher_width):
    """Let tasks be built without a data set: sources and caches of any name exist, and hold nothing."""

    def manifest_of(directory, target):
        return {"teacher_width": teacher_width, "codebook_size": mock.ANY}

    def open_cache(directory, config, *_):
        manifest = {"teacher_width": teacher_width, "codebook_size": config.model.get("codebook_size")}
        return (types.SimpleNamespace(manifest=manifest, num_views=config.views.num_views),) * 2

    def open_sources(config):
        return (FakeSource(config.model.get("num_classes", 1000)),) * 2

    with (
        mock.patch.object(targets, "manifest_of", manifest_of),
        mock.patch.object(targets, "check_targets", lambda *_: None),
        mock.patch.object(targets, "open_cache", open_cache),
        mock.patch.object(inputs, "open_sources", open_sources),
        mock.patch.object(inputs, "train_batches", lambda *args, **kwargs: None),
    ):
        yield
