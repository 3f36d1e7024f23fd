"""Every error that is made here is noted, as the last test of each file asks for all of its part of the package."""

import pytest
import user_errors


@pytest.fixture(autouse=True)
def _note_errors(monkeypatch):
    user_errors.note_errors(monkeypatch)
