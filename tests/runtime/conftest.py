"""The server of misbehaving downloads, as a fixture."""

from tests.data.test_download import server  # noqa: F401
