"""What the tests of torch's files share."""

import pytest
from torch_files import reader


@pytest.fixture
def read(tmp_path):
    return reader(tmp_path)
