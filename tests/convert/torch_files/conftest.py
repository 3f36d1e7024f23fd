"""Common to the tests of torch's files."""

import pytest
from torch_files import reader


@pytest.fixture
def read(tmp_path):
    return reader(tmp_path)
