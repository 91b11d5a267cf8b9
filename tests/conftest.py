"""What the tests of whole runs share: pictures, trained checkpoints, and a Runner in a folder of the test's own."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import Runner, Zygote, make_pictures

MODULES = ("runtime.faults", "runtime.faults_run", "runtime.faults_disk", "runtime.faults_data", "runtime.faults_download")
pytest.register_assert_rewrite(*(f"tests.{name}" for name in MODULES))

# A shell that starts the tests in the background, or nohup, has signals ignored, and runs heed that: not in the tests.
for name, default in {"SIGINT": signal.default_int_handler, "SIGHUP": getattr(signal, "SIG_DFL", None)}.items():
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), default)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def run(zygote, pictures, tmp_path) -> Runner:
    return Runner(zygote, tmp_path, pictures)


@pytest.fixture(scope="session")
def trained(zygote, pictures, tmp_path_factory) -> Runner:
    """A finished run without classes. Only to be read."""
    runner = Runner(zygote, tmp_path_factory.mktemp("trained"), pictures)
    runner.train()
    return runner


@pytest.fixture(scope="session")
def trained_with_classes(zygote, pictures, tmp_path_factory) -> Runner:
    """A finished run of a network that knows the classes. Only to be read."""
    runner = Runner(zygote, tmp_path_factory.mktemp("trained_with_classes"), pictures)
    runner.train(CLASS_CONDITIONAL=True, LABEL_DROPOUT=0.3)
    return runner
