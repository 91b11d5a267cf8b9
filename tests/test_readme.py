"""Every command of the README works when pasted, every file it names is there, and every setting it quotes is config.py's."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
from src.runtime.early import cores
from src.runtime.settings import KINDS
from src.utils import count
from tests.runs import ROOT, Process
from tests.runtime.test_choice import make_cifar10, make_tiny_imagenet, save

NATURE = [word.strip() for word in config.PRESETS["nature"]["CLASSES"].split(",")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line.partition(" #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
COMMANDS = [command.strip() for line in LINES for command in line.split("&&")]

# The README names this environment variable: sizes with which each train command takes seconds. What it types wins over them.
NETWORK = "--image_size 24 --unet_dim 16 --dim_mults 1,1,2,4 --attention_resolutions 0 --num_res_blocks 1 --compile false "
SHORT = "--batch_size 4 --val_images 4 --num_samples 4 --preview_steps 2 --max_steps 3 --num_workers 0 --device cpu"
# Of the installation, the suite itself, and a server.
BY_HAND = ("git ", "cd ", "source ", "pip ", "python -m ", "tensorboard ")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone as far as the commands look at it, and small stand-ins for what they would download or a user brings."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "docs").mkdir()
    for name in ("nature.pth", "shapes.pth"):
        shutil.copy(ROOT / "docs" / name, folder / "docs")
    for i in range(70):
        save(folder / "data/my_pictures" / ("cat", "dog")[i % 2] / f"{i}.jpg", i)
    make_tiny_imagenet(folder / "data/tiny-imagenet-200", NATURE, 70, 70)
    make_cifar10(folder / "data/cifar-10-batches-bin", [f"class{i}" for i in range(10)], 20)
    return folder


@pytest.fixture(scope="module")
def results(clone, zygote) -> dict[str, tuple[int, str]]:
    """Every command of the README, in its order, in one folder, with nothing appended: {command: (exit code, what it said)}."""
    found = {}
    for command in COMMANDS:
        if command.startswith(("python -c", "torchrun ")):
            program, *words = [str(ROOT / word) if word.endswith(".py") else word for word in shlex.split(command)]
            words = ["-m", "torch.distributed.run", *words] if program == "torchrun" else words
            where = {"cwd": clone, "env": os.environ | {"PYTHONPATH": str(ROOT), "DDPM_FLAGS": NETWORK + SHORT}}
            done = subprocess.run([sys.executable, *words], **where, capture_output=True, text=True)
            found[command] = done.returncode, done.stdout + done.stderr
        elif command and not command.startswith(BY_HAND):
            _, script, *words = shlex.split(command)
            setup = f"import os; os.environ['DDPM_FLAGS'] = {SHORT if '--init_from' in words else NETWORK + SHORT!r}"
            process = Process(zygote, clone, script, words, setup).wait(timeout=300)
            found[command] = process.code, process.out + process.err
    return found


@pytest.mark.slow
def test_every_command_works_in_the_order_of_the_page(results):
    assert len(results) >= 30 and {"train.py", "sample.py", "evaluate.py", "export.py"} <= set(" ".join(results).split())
    assert all(f"test_{name}()" in " ".join(results) for name in ("dataset", "model", "diffusion")), "the self-tests"
    failed = {command: said for command, (code, said) in results.items() if code or "Traceback" in said}
    assert not failed, "\n\n".join(f"{command}\n{said}" for command, said in failed.items())


@pytest.mark.slow
def test_the_first_command_draws_with_every_core_where_nobody_has_set_a_number_of_threads(clone):
    """Threads that spin as libgomp has it made this take minutes on a busy machine."""
    first = next(command for command in COMMANDS if command.startswith("python sample.py"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))}
    _, script, *words = [*shlex.split(first), "--output_dir", "own-threads", "--device", "cpu"]
    command = [sys.executable, ROOT / script, *words]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"CPU, {count(cores(), 'thread')}" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_commands_leave_what_the_page_says(results, clone):
    first = clone / "outputs/pictures/001"
    assert len(list((first / "images").iterdir())) == 40 and (first / "grid.png").exists()
    for run in ("", "demo", "nature", "mine", "fine", "cifar10", "large", "two-gpus"):
        assert (clone / "checkpoints" / run / "best.pth").exists(), run
    series = clone / "outputs/series"
    assert len(list((series / "images").iterdir())) == 8  # drawn anew with --overwrite
    folders = list((clone / "outputs/demo/pictures").iterdir())
    assert any((path / "samples.npz").exists() for path in folders)
    assert any((path / "interpolation.gif").exists() for path in folders)
    assert (clone / "outputs/for-diffusers/README.md").exists()


@pytest.mark.slow
def test_a_checkpoint_opens_as_shown(results, clone, monkeypatch):
    monkeypatch.chdir(clone)
    (snippet,) = re.findall(r"`(torch\.load.*?)`", README)
    assert eval(snippet, {"torch": torch})["IMAGE_SIZE"] == 24


def test_the_example_of_a_library_runs(capsys):
    (snippet,) = re.findall(r"```python\n(import torch.*?)```", README, re.DOTALL)
    there = {}
    exec(snippet, there)
    assert there["images"].shape == (4, 3, 16, 16) and there["images"].abs().max() <= 1


def test_each_flag_of_sample_has_an_example():
    import sample

    flags = {f"--{name}" for name in vars(sample.read_flags([])) if name not in ("typed", "command")}
    shown = {word for command in COMMANDS if "sample.py" in command for word in re.findall(r"--\w+", command)}
    assert flags <= shown, f"no example shows {sorted(flags - shown)}"


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8"))
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_page_is_short():
    """200 lines, and no line of code over 100 characters: it can be pasted from a browser's window."""
    code = [line for block in re.findall(r"```\w*\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    assert len(README.splitlines()) <= 200 and max(map(len, code)) <= 100


def test_settings_quoted_are_those_of_config():
    quoted = re.findall(r"`([A-Z_]+)` ([\d.e-]+\d)", README)
    assert quoted
    for name, value in quoted:
        assert name in KINDS and float(value) == getattr(config, name), f"the README says {name} is {value}"
