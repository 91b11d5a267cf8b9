"""Every command of the README works when pasted, every file it names is there, and every setting it quotes is config.py's."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
from src.runtime.settings import KINDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [command.strip() for line in LINES for command in line.split("&&")]

# Appended to each train command, and winning over what it says: the same way through the code in seconds.
SMALL = (
    "--image_size 16 --unet_dim 8 --dim_mults 1,2 --attention_resolutions 8 --num_res_blocks 1 --batch_size 4 --val_images 4 "
    "--num_samples 4 --preview_steps 2 --max_steps 2 --epochs 1 --num_workers 0 --device cpu --compile false"
)


def commands(script: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(f"python {script}")]


def run(command: str, monkeypatch) -> None:
    """`python SCRIPT.py FLAGS` in this process."""
    _, script, *flags = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    assert importlib.import_module(script.removesuffix(".py")).main() == 0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder as a user's clone would be after some use: pictures, a small Tiny ImageNet, and two checkpoints."""
    folder = tmp_path_factory.mktemp("clone")
    random = np.random.default_rng(0)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, "JPEG")

    for i in range(12):
        picture(folder / "my_pictures" / f"{i}.jpg")
        picture(folder / f"data/tiny-imagenet-200/train/n0{i % 2}/images/{i}.JPEG")
        picture(folder / f"data/tiny-imagenet-200/val/images/{i}.JPEG")
    tiny = folder / "data/tiny-imagenet-200"
    (tiny / "wnids.txt").write_text("n00\nn01\n")
    (tiny / "val/val_annotations.txt").write_text("".join(f"{i}.JPEG\tn0{i % 2}\t0\t0\t9\t9\n" for i in range(12)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(f"python train.py --preset demo {SMALL} --max_steps 2", patch)
        run(f"python train.py {SMALL}", patch)
        for place in ("checkpoints", "checkpoints/demo"):
            Path(place, "best.pth").write_bytes(Path(place, "latest.pth").read_bytes())
    return folder


def test_the_readme_has_commands_to_test():
    assert len(commands("train.py")) >= 5 and len(commands("sample.py")) >= 10


@pytest.mark.parametrize("command", commands("train.py"))
def test_train_commands_run(command, workplace, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(workplace)
    if "--help" in command:
        with pytest.raises(SystemExit) as end:
            run(command, monkeypatch)
        assert end.value.code == 0
        return
    run(f"{command} {SMALL} --checkpoint_path {tmp_path}", monkeypatch)
    assert (tmp_path / "latest.pth").exists()


@pytest.mark.parametrize("command", commands("sample.py"))
def test_sample_commands_run(command, workplace, monkeypatch, tmp_path):
    monkeypatch.chdir(workplace)
    run(f"{command} --num_samples 3 --interp_steps 3 --output_dir {tmp_path}", monkeypatch)
    assert list(tmp_path.glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("torchrun")])
def test_torchrun_commands_run(command, workplace, tmp_path):
    small = SMALL if "train.py" in command else "--num_samples 3 --steps 2 --device cpu"
    small += f" {'--checkpoint_path' if 'train.py' in command else '--output_dir'} {tmp_path / 'out'}"
    _, *words = shlex.split(f"{command} {small}".replace("nproc_per_node=8", "nproc_per_node=2"))
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=workplace,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("latest.pth" if "train.py" in command else "samples.npz"))


def test_each_flag_of_sample_has_an_example():
    import sample

    flags = {f"--{name}" for name in vars(sample.read_flags([]))}
    shown = set(re.findall(r"--\w+", " ".join(commands("sample.py"))))
    assert flags <= shown, f"no example shows {sorted(flags - shown)}"


@pytest.mark.parametrize("snippet", [shlex.split(command)[2] for command in commands("-c")])
def test_self_tests_run(snippet, capsys):
    exec(snippet, {})
    assert capsys.readouterr().out


def test_a_checkpoint_opens_as_shown(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (snippet,) = re.findall(r"```python\n(torch\.load.*?)```", README, re.DOTALL)
    assert eval(snippet, {"torch": torch})["IMAGE_SIZE"] == 16


def test_files_named_are_there():
    named = set(re.findall(r"\]\((?!http|#)([^)]+)\)", README)) | set(re.findall(r"`((?:src/)?\w+\.py)`", README))
    here = [name for name in named if (ROOT / name).exists() or (ROOT / "src" / name).exists()]
    assert sorted(named) == sorted(here)


def test_every_source_file_is_in_the_tour():
    table = README[README.index("## Files") :]
    missing = [path.name for path in (ROOT / "src").glob("[a-z]*.py") if path.name not in table]
    assert not missing


def test_settings_quoted_are_those_of_config():
    quoted = re.findall(r"`([A-Z_]+)` ([\d.e-]+\d)", README)
    assert quoted
    for name, value in quoted:
        assert name in KINDS and float(value) == getattr(config, name), f"the README says {name} is {value}"
