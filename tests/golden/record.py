"""Golden facts: what tiny runs of the three scripts gave when `python -m tests.golden.record` last wrote facts.json.

They hold a rebuilt program to the old one: trained weights, drawn pictures, measured figures, refusals. A fact may change
only where the program was wrong before, and the commit says so.

version_1.pth.xz is a checkpoint of format version 1 as commit 6030fdc wrote it: TINY of tests/runs.py with classes, 13 of 30
steps.
"""

import hashlib
import json
import lzma
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.runs import Runner, Zygote, make_pictures

FOLDER = Path(__file__).parent

# A network with every kind of layer, small enough for a second.
NETWORK = dict(UNET_DIM=8, DIM_MULTS=(1, 2), ATTENTION_RESOLUTIONS=(4,), LOG_EVERY=5, EPOCHS=2, SAVE_EVERY=1)
RUNS = {
    "plain": {},
    "classes": dict(
        CLASS_CONDITIONAL=True, GRAD_ACCUM_STEPS=2, BATCH_SIZE=4, BETA_SCHEDULE="cosine", PREDICTION="v", MIN_SNR_GAMMA=5.0
    ),
    "dropout": dict(DROPOUT=0.1, PREDICTION="x0", ACTIVATION_CHECKPOINTING=True),
}
DRAWINGS = {
    "ddpm": "--sampler ddpm --steps 50",
    "ddpm in 7 steps": "--sampler ddpm --steps 7 --spacing even",
    "ddpm-beta": "--sampler ddpm-beta --steps 50",
    "ddim": "--sampler ddim --steps 5 --spacing even",
    "ddim with eta": "--sampler ddim --steps 5 --spacing even --eta 0.5",
    "dpm++": "--sampler dpm++ --steps 5 --spacing even",
    "guidance": "--sampler dpm++ --steps 5 --spacing even --guidance 2.5 --classes 1,3",
    "raw": "--sampler dpm++ --steps 5 --spacing even --weights raw",
}
# Words behind `python train.py` or sample.py; the exit code; what its sentence must name.
REFUSALS = [
    ("train.py", "--batch_size many", 2, ["--batch_size", "'many'", "whole number", "1"]),
    ("train.py", "--learning_rate -1", 2, ["--learning_rate", "-1", "above 0"]),
    ("train.py", "--beta_schedule cosin", 2, ["--beta_schedule", "'cosin'", "linear", "cosine"]),
    ("train.py", "--preset dmo", 2, ["--preset", "'dmo'", "demo", "h100"]),
    ("train.py", "--batchsize 4", 2, ["--batchsize", "--batch_size"]),
    ("train.py", "--dataset lsun", 2, ["--dataset", "lsun", "tiny-imagenet", "folder", "shapes"]),
    ("train.py", "--image_size 30", 2, ["--image_size", "30", "multiples of 8", "24 or 32"]),
    ("train.py", "--unet_dim 100", 2, ["--unet_dim", "100", "multiples of 8", "96 or 104"]),
    ("train.py", "--precision fp16 --device cpu", 2, ["--precision", "fp16", "--device cpu", "fp32", "bf16"]),
    ("sample.py", "--checkpoint nowhere.pth", 1, ["nowhere.pth", "Choose one of"]),
    ("sample.py", "--sampler euler", 2, ["--sampler", "'euler'", "ddpm", "ddim", "dpm++"]),
    ("sample.py", "--eta 0.5", 2, ["--eta", "0.5", "ddim"]),
]


def digest(tensors: Iterable[Tensor]) -> str:
    """Of the values in their order, whatever they are called."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def facts_of(state: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint: for each part a hash to the last bit, and a norm that another machine gives as well, nearly."""
    moments = state["optimizer"]["state"]
    parts = {
        "model": list(state["model"].values()),
        "ema": list(state["ema"].values()),
        "exp_avg_sq": [moments[i]["exp_avg_sq"] for i in moments],
    }
    norms = {name: float(torch.cat([t.double().flatten() for t in part]).norm()) for name, part in parts.items()}
    hashes = {name: digest(part) for name, part in parts.items()}
    progress = {name: state[name] for name in ("step", "epoch", "best_loss", "classes")}
    return {"shapes": digest(torch.tensor(t.shape) for t in parts["model"]), "hashes": hashes, "norms": norms} | progress


def pixels(folder: Path) -> list[str]:
    """Every picture as hexadecimal digits."""
    return [np.asarray(Image.open(path)).tobytes().hex() for path in sorted(folder.rglob("[0-9]*.png"))]


def leaves(tree: Any, name: str = "") -> dict[str, float]:
    """The numbers of a JSON, by dotted names."""
    if isinstance(tree, dict):
        return {key: value for part in tree for key, value in leaves(tree[part], f"{name}.{part}").items()}
    if isinstance(tree, list):
        return {key: value for i, part in enumerate(tree) for key, value in leaves(part, f"{name}.{i}").items()}
    return {name[1:]: tree} if isinstance(tree, float) else {}


def figures(run: Runner, *words: Any) -> dict[str, float]:
    """What evaluate.py writes of a call, but for dates and paths."""
    process = run.start("evaluate.py", "--device", "cpu", "--precision", "fp32", "--output_dir", "reports", *words).wait()
    assert process.code == 0, process.err
    path = next((run.folder / "reports").glob("*.json"))
    report = json.loads(path.read_text())
    path.unlink()
    return leaves({section: part for section, part in report.items() if section != "protocol"})


def record(zygote: Zygote, folder: Path) -> dict[str, Any]:
    """All facts, from runs in `folder`."""
    (folder / "pictures").mkdir()
    pictures = make_pictures(folder / "pictures")
    facts: dict[str, Any] = {"runs": {}, "pictures": {}, "figures": {}, "refusals": {}}
    facts["runs"]["version 1, resumed"] = facts_of(resume_version_1(zygote, folder / "version_1", pictures).state())
    runners = {name: Runner(zygote, folder / name, pictures) for name in RUNS}
    for name, runner in runners.items():
        runner.train(**NETWORK | RUNS[name])
        facts["runs"][name] = facts_of(runner.state())
        resumed = runner.to("resumed")
        resumed.train(**NETWORK | RUNS[name] | dict(max_steps=13))
        resumed.train(**NETWORK | RUNS[name])
        facts["runs"][f"{name}, resumed after 13 steps"] = facts_of(resumed.state())
    run = runners["classes"]
    for name, words in DRAWINGS.items():
        always = ["--checkpoint", "checkpoints/best.pth", "--num_samples", 2, "--precision", "fp32", "--seed", 5]
        run.sample(*always, "--output_dir", name, *words.split())
        facts["pictures"][name] = pixels(run.folder / name)
    facts["figures"]["classes"] = figures(
        run, *shlex.split("--checkpoint checkpoints/best.pth --loss --nll --exact --nearest 2 --num_samples 2 --spacing even")
    )
    (a, b), shapes = (folder / "a", folder / "b"), sorted(pictures.rglob("*.png"))
    for target, some in ((a, shapes[::2]), (b, shapes[1::2])):
        target.mkdir()
        for path in some:
            shutil.copy(path, target)
    facts["figures"]["a, b"] = figures(run, "--samples", a, "--reference", b, "--features", "random", "--kid_subset_size", 20)
    for script, words, code, named in REFUSALS:
        process = run.start(script, *words.split()).wait()
        facts["refusals"][f"{script} {words}"] = [process.code, process.err.strip()]
        assert process.code == code and all(word in process.err for word in named), process.err
    return facts


def resume_version_1(zygote: Zygote, folder: Path, pictures: Path) -> Runner:
    """The stored checkpoint, trained to its end."""
    runner = Runner(zygote, folder, pictures)
    latest = folder / "checkpoints" / "latest.pth"
    latest.parent.mkdir(parents=True)
    latest.write_bytes(lzma.decompress((FOLDER / "version_1.pth.xz").read_bytes()))
    runner.train(CLASS_CONDITIONAL=True)
    return runner


def machine() -> str:
    """What may change the last bits of a result."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "unknown")
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {cpu.partition(':')[2].strip()}"


def main() -> None:
    zygote = Zygote()
    with tempfile.TemporaryDirectory() as folder:
        facts = record(zygote, Path(folder))
    zygote.close()
    (FOLDER / "facts.json").write_text(json.dumps({"machine": machine()} | facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
