"""What the tests of the data share."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest


class Commons:
    """A folder that every user may write to. In `with commons.as_user():` permissions count, even if root runs the tests."""

    def __init__(self, path):
        self.path = path

    @contextlib.contextmanager
    def as_user(self):
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


@pytest.fixture
def commons():
    if not hasattr(os, "geteuid"):
        pytest.skip("Windows has permissions of another kind")
    path = Path(tempfile.mkdtemp())  # not tmp_path, which is for its owner alone
    path.chmod(0o777)
    yield Commons(path)
    shutil.rmtree(path)
