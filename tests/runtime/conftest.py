"""The server of the faults of downloads, as a fixture."""

from tests.runtime.faults_data import server  # noqa: F401
