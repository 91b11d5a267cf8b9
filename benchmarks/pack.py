"""Fill .travel anew with what a machine without a network lacks: pictures of `--preset nature`, and wheels for Python 3.12.

    python -m benchmarks.pack --data_path data/tiny-imagenet-200

.travel/ten is a Tiny ImageNet of ten classes; .travel/wheels has the packages below and what they need, but for what comes with
torch. git ignores the folder. docs/gpu.md says what to do with it.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from config import PRESETS
from src.data.tiny_imagenet import TinyImageNet

PACKAGES = ["requests", "torch-fidelity", "diffusers", "denoising-diffusion-pytorch"]
THERE = ["torch", "torchvision", "numpy", "pillow", "scipy", "tqdm", "filelock", "fsspec", "typing-extensions"]
PLATFORMS = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 36))]  # pip takes each as it is
TRAVEL, IDS = Path(".travel"), str(PRESETS["nature"]["CLASSES"]).replace(" ", "").split(",")


def take_pictures(source: Path, target: Path) -> None:
    for split in ("train", "val"):
        images = TinyImageNet(source, split)
        names = dict(zip(images.class_ids, images.classes))
        for file, label in zip(images.files, images.labels):
            if images.class_ids[label] in IDS:
                folder = target / split / images.class_ids[label]
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder)
    (target / "wnids.txt").write_text("\n".join(IDS))
    (target / "words.txt").write_text("\n".join(f"{name}\t{names[name]}" for name in IDS))


def fetch_wheels(folder: Path) -> None:
    """Round by round: what the wheels that have come say they need."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12"]
    folder.mkdir()
    pip += [f"--dest={folder}", *(f"--platform={platform}" for platform in PLATFORMS)]
    seen, wanted = set(THERE), {name: name for name in PACKAGES}
    where = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "extra": ""}
    while wanted:
        subprocess.run([*pip, *wanted.values()], check=True)
        seen |= wanted.keys()
        wanted = {}
        for wheel in folder.glob("*.whl"):
            info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/"
            for line in PathDistribution(zipfile.Path(wheel, info)).requires or []:  # type: ignore[arg-type]
                need = Requirement(line)
                name = canonicalize_name(need.name)
                if name not in seen and (not need.marker or need.marker.evaluate(where)):
                    wanted[name] = f"{need.name}{need.specifier}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, default=Path("data/tiny-imagenet-200"), help="Tiny ImageNet, unpacked")
    data_path = parser.parse_args().data_path
    shutil.rmtree(TRAVEL, ignore_errors=True)
    take_pictures(data_path, TRAVEL / "ten")
    fetch_wheels(TRAVEL / "wheels")
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    parts = {"repository": map(Path, tracked)} | {name: (TRAVEL / name).rglob("*") for name in ("ten", "wheels")}
    sizes = {name: sum(path.stat().st_size for path in files if path.is_file()) / 2**20 for name, files in parts.items()}
    print(", ".join(f"{name} {size:.1f} MiB" for name, size in sizes.items()) + f": {sum(sizes.values()):.1f} MiB in all")


if __name__ == "__main__":
    main()
