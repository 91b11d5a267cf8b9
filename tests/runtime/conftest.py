"""The server of the faults of downloads, as a fixture."""

from tests.runtime.faults_download import server  # noqa: F401
