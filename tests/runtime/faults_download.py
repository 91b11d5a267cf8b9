"""Faults of docs/reliability.md: downloads and archives."""

import io
import zipfile

from tests.runs import Process, Runner
from tests.runtime.faults import fault

PATIENCE = "from src.data import download; download.TIMEOUT, download.PAUSE = (2, 0.3), 0.01"


@fault("The server does not have the file", way="missing")
@fault("The server stalls", way="always-stall")
@fault("The line drops again and again", way="always-cut")
@fault("There is no network", way="", DATA_URL="http://127.0.0.1:9/a.zip")
@fault("The server asks to wait for long", way="much-later")
@fault("The server sends a web page", way="html")
@fault("The server has a file of another size", way="file", DATA_SIZE=5)
@fault("The checksum is wrong", way="file")
@fault("The archive is damaged", way="file", DATA_MD5="")
def download(run: Runner, server, way: str, **settings) -> Process:
    """A run that has to download its pictures, and does not get them."""
    defaults = {"DATA_URL": f"{server.url}/{way}/a.zip", "DATA_SIZE": 0, "DATA_MD5": "0" * 32}
    process = run.start_train(
        PATIENCE, DATASET="tiny-imagenet", DATA_PATH="data/tiny-imagenet-200", **defaults | settings
    ).wait()
    left = {path.name: path.stat().st_size for path in (run.folder / "data").glob("*")}
    tried_again = way.startswith("always-")
    expected = {"tiny-imagenet-200.zip.part"} if tried_again else {"tiny-imagenet-200.zip"} & set(left)
    assert set(left) == expected, "something half-made is left"
    assert len(server.requests) == (5 if tried_again else "DATA_URL" not in settings)
    return process


@fault("There is no network, for a dataset of torchvision")
def no_network_for_torchvision(run):
    setup = "from torchvision.datasets import MNIST; MNIST.mirrors = ['http://127.0.0.1:9/']"
    return run.start_train(setup, DATASET="mnist", DATA_PATH="digits").wait()


def archive(**files: int) -> bytes:
    """A zip of files by these names, which say that they unpack to so many bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, size in files.items():
            target.writestr(name, b"x")
            target.filelist[-1].file_size = size
    return file.getvalue()


@fault("The archive reaches outside its folder")
def zip_traversal(run, server):
    server.file = archive(**{"top/../../../evil": 1})
    process = download(run, server, "file", DATA_MD5="")
    assert not list(run.folder.rglob("evil")) and not (run.folder.parent / "evil").exists()
    return process


@fault("The archive is a zip bomb")
def zip_bomb(run, server):
    server.file = archive(**{"top/a": 3 << 30, "top/b": 3 << 30})
    return download(run, server, "file", DATA_MD5="")
