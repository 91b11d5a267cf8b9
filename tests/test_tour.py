"""docs/tour.md: the functions it names are there, and each change it shows works in a copy of the repository."""

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import ROOT

TEXT = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", TEXT)  # [`EMA.update`](../src/ema.py)


def names(file: str) -> set[str]:
    """The functions and classes of a file, methods as Class.method."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = {node.name for node in tree.body if isinstance(node, kinds)}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return found | {f"{node.name}.{method.name}" for node in classes for method in node.body if isinstance(method, kinds)}


def test_each_function_named_is_in_the_file_that_its_link_leads_to():
    assert len(LINKS) >= 40 and len(LINKS) == TEXT.count(".py)")
    assert not [f"{file} has no {name}" for name, file in LINKS if name not in names(file)]


def test_each_file_of_the_hall_is_on_the_tour():
    assert not [path.name for path in (ROOT / "src").glob("[a-z]*.py") if f"src/{path.name}" not in TEXT]


# --- examples ---------------------------------------------------------------------------------------
# A ```diff block is `--- FILE`, then lines: "-" are in the file and go, " " are and stay, "+" come. Those of one place
# stand together, and a place is found by its "-" and " " lines.


def example(heading: str) -> str:
    found = re.search(rf"### {heading}\n.*?```diff\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found[1]


def places(diff: str) -> Iterator[tuple[str, str, str]]:
    """(file, text there is, text there shall be) of each change: "+" lines, what they replace, what they stand before."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        file, _, body = part.partition("\n")
        for place in re.findall(r"(?:^\+.*\n)*(?:^[- ].*\n)+(?:^\+.*\n)*", body, re.MULTILINE):
            old, new = ("".join(line[1:] for line in place.splitlines(True) if line[0] in kinds) for kinds in ("- ", "+ "))
            yield file, old, new


def apply(diff: str, folder: Path) -> None:
    for file, old, new in places(diff):
        text = (folder / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"docs/tour.md changes lines that {file} no longer has:\n{old}"
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository, to be changed, and some pictures as an .npz."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for script in ("config.py", "train.py", "sample.py"):
        shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    random = np.random.default_rng(0)
    np.savez(folder / "pictures.npz", arr_0=random.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8), arr_1=np.arange(60) % 3)
    for i in range(40):
        (folder / "pictures").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
    return folder


SMALL = (
    "--dataset folder --data_path pictures --image_size 8 --unet_dim 8 --dim_mults 1,2 --attention_resolutions 0 "
    "--num_res_blocks 1 --batch_size 8 --val_images 2 --num_samples 4 --preview_steps 2 --num_workers 0 --device cpu "
    "--compile false --epochs 1 --warmup_steps 1"
)


def execute(folder: Path, heading: str, program: str) -> str:
    """Apply the example to a copy. Return what the program prints there; run("train.py --flag value") is what a user types."""
    apply(example(heading), folder)
    start = """
        import importlib, shlex, sys
        def run(line):
            sys.argv = shlex.split(line)
            assert importlib.import_module(sys.argv[0].removesuffix(".py")).main() == 0, line
    """
    code = textwrap.dedent(start) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_dataset_example_trains_and_takes_what_sample_npz_writes(copy):
    program = f"""
        run("train.py {SMALL} --dataset npz --data_path pictures.npz --class_conditional true")
        from src.dataset import DATASETS
        import numpy as np
        np.savez("samples.npz", arr_0=np.zeros((40, 8, 8, 3), np.uint8))
        for split, count in (("train", 38), ("val", 2)):
            dataset = DATASETS["npz"]("samples.npz", split, 8)
            assert len(dataset) == count and dataset[1][0].shape == (8, 8, 3) and dataset[1][1] == 0
    """
    out = execute(copy, "A dataset", program)
    assert "npz train: 57 images of 3 classes at 8x8" in out and "npz val: 3 images" in out
    assert (copy / "checkpoints" / "latest.pth").exists()


def test_the_sampler_example_draws_and_is_nearer_to_the_truth_than_a_method_of_first_order(copy):
    program = f"""
        import torch
        from src.diffusion import GaussianDiffusion, at
        diffusion, mean, std = GaussianDiffusion(), 0.3, 0.2

        def denoiser(x, t, y):  # E[eps | x_t] for data from N(mean, std^2): the exact picture is known in closed form
            signal, sigma = at(diffusion.signal, t), at(diffusion.sigma, t)
            return sigma * (x - signal * mean) / (signal**2 * std**2 + sigma**2)

        x_T = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        abar = diffusion.alphas_cumprod[-1].item()
        exact = mean + std * (x_T - abar**0.5 * mean) / (abar * std**2 + 1 - abar) ** 0.5
        def error(sampler, steps):
            x = diffusion.sample(denoiser, x_T.shape, sampler=sampler, steps=steps, noise=x_T, clip_denoised=False)
            return (x - exact).abs().max().item()

        print("errors", error("heun", 200), error("ddim", 400))  # as many network calls
        run("train.py {SMALL}")
        run("sample.py --sampler heun --steps 5 --num_samples 2 --device cpu")
    """
    heun, ddim = map(float, re.search(r"errors (\S+) (\S+)", execute(copy, "A sampler", program)).groups())
    assert heun < 0.01 and heun < 0.6 * ddim
    assert (copy / "outputs" / "pictures" / "001" / "images" / "000001.png").exists()


def test_the_schedule_example_ends_in_noise_and_trains(copy):
    program = f"""
        from src.diffusion import test_diffusion
        test_diffusion()
        run("train.py {SMALL} --beta_schedule sigmoid")
    """
    assert "step 4: validation loss" in execute(copy, "A schedule", program)


def test_the_conditioning_example_trains_and_the_network_heeds_what_it_is_told(copy):
    program = f"""
        run("train.py {SMALL}")
        import torch
        from src.runtime.build import build_diffusion, build_model
        from src.runtime.checkpoint import Path, load_checkpoint
        state = load_checkpoint(Path("checkpoints/latest.pth"))
        model = build_model(state["config"], 1)
        model.load_state_dict(state["model"])
        torch.manual_seed(0)
        x_t, t, grey = torch.randn(2, 3, 8, 8), torch.tensor([0, 500]), torch.rand(2, 1, 8, 8)
        dark, bright = (model(x_t, t, y) for y in (grey, 1 + grey))
        assert (dark != bright).float().mean() > 0.9
        assert build_diffusion(state["config"]).sample(model, x_t.shape, "dpm++", 5, y=grey).abs().max() <= 1
    """
    assert "step 4: validation loss" in execute(copy, "A conditioning", program)
    assert list((copy / "outputs" / "samples").glob("*.png"))
