"""What a message tells to type works, and each message that tells so has a test."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT, ended

ABSENT = "cuda" if torch.backends.mps.is_available() else "mps"

# script, what is wrong, what the refusal advises, that typed behind it: of two flags alike the last counts
ADVICE = [
    ("train.py", "--batch_size 128", "Use a smaller --batch_size", "--batch_size 8"),
    ("train.py", "--image_size 28 --dim_mults 1,2,3,4", "as it is with --dim_mults 1,2,3.", "--dim_mults 1,2,3"),
    ("train.py", "--precision fp16", "allowed are fp32 and bf16 on a CPU", "--precision bf16"),
    ("train.py", "--data_path nowhere", "Name the folder of your pictures with --data_path", "--data_path pictures"),
    ("train.py", "--data_path nowhere --dataset tiny-imagenet", "Correct --data_path", "--data_path pictures --dataset folder"),
    ("train.py", "--checkpoint_path file/x", "another place with --checkpoint_path", "--checkpoint_path new"),
    ("train.py", "--output_path file/x", "another place with --output_path", "--output_path new"),
    ("train.py", "--log_path file/x", "another place with --log_path", "--log_path new"),
    ("train.py", "--cache_path file/x", "another place with --cache_path", "--cache_path new"),
    ("train.py", "--init_from best.pth --unet_dim 16", "Give its own settings: --unet_dim 8.", "--unet_dim 8"),
    ("train.py", "--dataset own", "allowed are", "--dataset folder"),
    ("train.py", f"--device {ABSENT}", "Use --device auto.", "--device auto"),
    ("sample.py", "--output_dir file/x", "another place with --output_dir", "--output_dir new"),
    ("sample.py", "--eta 0.5", "with --sampler dpm++; only --sampler ddim takes it", "--sampler ddim"),
    ("sample.py", "--interpolate --sampler ddpm", "allowed are dpm++, and ddim with --eta 0", "--sampler ddim --eta 0"),
    ("sample.py", "--steps 51", "allowed are 1 to 50", "--steps 50"),
    ("sample.py", "--guidance 2", "this checkpoint knows no classes", "--guidance 1"),
    ("evaluate.py", "--exact", "belongs to --nll; add it", "--nll"),
    ("evaluate.py", "--nll --exact --nll_steps 2 --loss", "give one of the two", "--exact false"),
]


@pytest.mark.parametrize(("script", "wrong", "advice", "right"), ADVICE)
def test_what_is_advised_works(run, trained, script, wrong, advice, right):
    (run.folder / "file").touch()
    (run.folder / "pictures").symlink_to(run.pictures)
    (run.folder / "best.pth").symlink_to(trained.folder / "checkpoints" / "best.pth")
    drawing = ["--checkpoint", "best.pth", "--device", "cpu"]
    always = {
        "train.py": run.flags(max_steps=1),
        "sample.py": [*drawing, "--output_dir", "drawn", "--num_samples", "2", "--steps", "2"],
        "evaluate.py": [*drawing, "--precision", "fp32"],
    }[script]
    refused = run.start(script, *always, *wrong.split()).wait()
    assert refused.code in (1, 2) and advice in refused.err and len(refused.err.splitlines()) == 1, refused.err
    ended(run.start(script, *always, *wrong.split(), *right.split()), 0)


def messages() -> Iterator[tuple[str, str]]:
    """(file, sentence with <> for what is filled in) of each string that advises a flag or a command, but for --help."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("src/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        passed_over = set()
        for node in ast.walk(tree):
            name = getattr(node, "func", None) and (getattr(node.func, "attr", "") or getattr(node.func, "id", ""))
            target = getattr(node, "target", getattr(node, "targets", [None])[0])
            if name == "FlagParser" or getattr(target, "id", "") in ("rows", "description", "examples"):
                passed_over |= {id(part) for part in ast.walk(node)}
            if isinstance(node, ast.JoinedStr):
                passed_over |= {id(part) for part in ast.walk(node)} - {id(node)}
            if isinstance(node, ast.Expr):  # a docstring
                passed_over.add(id(node.value))
        for node in (node for node in ast.walk(tree) if id(node) not in passed_over):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "<>" for part in parts)
            advises = re.search(r"\w.* --[a-z]\w+|python \w+\.py |pip install", text)
            if isinstance(node, (ast.JoinedStr, ast.Constant)) and advises:
                yield str(path.relative_to(ROOT)), text


DECAY = "Either give the same --epochs and --max_steps; or decay over the new length with --accept_changes."
WORKERS, CLASSES = "Try fewer with --num_workers, 0 for none.", "Choose more of them with --classes"
ANEW = "To start anew from the best one, add --run again --init_from"
# Advice -> words of the test that brings it about and types it, where these are not the words of the message.
BROUGHT_ABOUT = {
    "with this --output_dir goes on": "Stopped at once. The pictures written so far",
    "a smaller --kid_subset_size": "There are 20 samples and",
    "Use --max_steps 10000": "--max_steps 10000.*--preset small",
    "Use --warmup_steps": "warm-up of 1,000 steps.*--warmup_steps 10",
    "Use --val_every": "after every 21 steps.*--val_every 10",
    "or use --class_conditional false": "There is one class",
    "Leave out --weights raw": "--weights",
    "on a --checkpoint_path that all machines share": "do not agree on",
    "train with --label_dropout 0.1": "LABEL_DROPOUT 0",
    "that it was trained on with --data_path": "The checkpoint was trained on",
    "as 'sample.py --npz' writes it": "expected arr_0, uint8",
    "tells more, as does --checkpoint": "--about",
}


def test_each_message_that_advises_is_in_a_test_or_in_the_table_of_faults():
    paths = [path for path in [*ROOT.glob("tests/**/*.py"), ROOT / "docs/reliability.md"] if path != Path(__file__)]
    tested = " ".join(re.sub(r"[\"'\\\s]+", " ", path.read_text(encoding="utf-8")) for path in paths)
    tested += " ".join([DECAY, WORKERS, CLASSES, ANEW, *(advice for _, _, advice, _ in ADVICE)])
    found = [
        (file, text) for file, text in messages() if not re.match("with|where|on |--[a-z]+ and --[a-z]+$|which series", text)
    ]
    assert len(found) > 60
    for file, text in found:
        known = [advice for advice in BROUGHT_ABOUT if advice in text]
        parts = [BROUGHT_ABOUT.get(advice, "") for advice in known]
        parts = parts or re.findall(r"(?:\w+[^\w<>]{1,3}){0,2}--[a-z]\w+|python \w+\.py|pip install", text)
        assert all(re.sub(r"[\"'\\\s]+", " ", part) in tested for part in parts), (file, text, parts)


def test_a_decay_over_another_length_goes_on_in_both_ways_advised(run):
    run.train(LR_SCHEDULE="cosine", max_steps=4)
    assert DECAY in run.train(LR_SCHEDULE="cosine", max_steps=6, code=1).err
    run.train(LR_SCHEDULE="cosine", max_steps=4)
    run.train(LR_SCHEDULE="cosine", max_steps=6, accept_changes=True)


def test_without_workers_pictures_are_decoded_where_a_worker_was_killed(run):
    killed = "import multiprocessing as m, os, src.data.folder as f; read = f.open_image; "
    killed += "f.open_image = lambda path: os.kill(os.getpid(), 9) if m.parent_process() else read(path)"
    assert WORKERS in run.train(killed, CACHE_PATH="cache", NUM_WORKERS=2, code=1).err
    run.train(killed, CACHE_PATH="cache", NUM_WORKERS=0, max_steps=1)


def test_more_classes_train_where_the_chosen_ones_have_no_validation_picture(run):
    for name in ("a/0", *(f"b/{i}" for i in range(9))):
        (path := run.folder / f"data/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(next(run.pictures.rglob("*.png")).read_bytes())
    settings = {"DATA_PATH": "data", "CACHE_PATH": "cache", "BATCH_SIZE": 1, "max_steps": 1}
    assert CLASSES in run.train(CLASSES="a", **settings, code=1).err
    run.train(CLASSES="a,b", **settings)


def test_a_run_that_has_diverged_says_so_and_starts_again_from_its_best_network(run):
    run.train(max_steps=10)
    state = run.state() | {"best_loss": 0.01}
    torch.save(state, run.folder / "checkpoints" / "latest.pth")
    warning = run.train(max_steps=20).out.split("times the lowest so far: ")[1].splitlines()[0]
    anew = warning.split(ANEW)[1].split()
    assert anew[0].endswith("best.pth") and anew[1:] == ["--learning_rate", "0.0005"]
    ended(run.start("train.py", *run.flags(max_steps=10), "--run", "again", "--init_from", *anew), 0)
