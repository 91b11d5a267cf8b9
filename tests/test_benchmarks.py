"""The benchmarks run, record consistent figures, and measure the step that train.py takes."""

import json
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import config
from benchmarks import common, equal_time, gpu, gpu_train, pack, train_step
from src import model as plain
from src.data.tiny_imagenet import TinyImageNet
from src.model import forward_gflop, parameter_count
from src.runtime import kernels
from src.runtime.build import build_model, open_images
from src.runtime.settings import resolve
from tests.runs import ended, same

FACTS = {"command", "hardware", "threads", "torch", "commit", "date", "tiny"}


@pytest.fixture(autouse=True)
def one_thread():
    """Like the runs of tests/runs.py, so that sums agree to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """bench(module, words) runs a benchmark in its tiny form on the CPU. It returns the JSON lines and what was printed."""

    def run(module, words=""):
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(sys, "argv", [name, "--tiny", "--device=cpu", f"--results={tmp_path}", *shlex.split(words)])
        code, said = common.main(name, module.__doc__, module.measure, module.FLAGS), capsys.readouterr()
        assert code == 0, said.err
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert all(line.keys() > FACTS and line["tiny"] for line in lines)
        return lines, said

    return run


def test_flops_are_two_per_multiplication():
    class Network(torch.nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    assert common.forward_gflop(Network(3, 5, 3, padding=1), 8) == pytest.approx(2 * 8 * 8 * 3 * 5 * 3 * 3 / 1e9)


@pytest.mark.parametrize("words", ["", "--preset nature", "--preset demo", "--dim_mults 2,3 --attention_resolutions 64"])
def test_the_plan_counts_the_flops_that_torch_counts(words):
    s = resolve(config, shlex.split(words)).settings
    model = build_model(s, 10)
    assert forward_gflop(model, s.IMAGE_SIZE) == pytest.approx(common.forward_gflop(model, s.IMAGE_SIZE), rel=1e-6)


def test_the_network_of_diffusers_has_the_shape_of_ours():
    pytest.importorskip("diffusers")
    s = resolve(config, shlex.split("--unet_dim 32 --image_size 32 --attention_resolutions 16,8")).settings
    ours, theirs = (common.forward_gflop(model, 32) for model in (build_model(s, 1), train_step.diffusers_unet(s)))
    assert theirs == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"GRAD_ACCUM_STEPS": 2, "CLASS_CONDITIONAL": True, "PREDICTION": "v", "DROPOUT": 0.3}])
def test_the_step_that_is_measured_is_the_one_that_train_py_takes(run, changes):
    run.train(max_steps=3, **changes)
    state, s = run.state(), resolve(config, run.flags(**changes)).settings
    step = train_step.Step(s, torch.device("cpu"), open_images(s, "train"))
    for _ in range(3):
        step()
    assert same(step.model.state_dict(), state["model"])
    assert same(step.ema.model.state_dict(), state["ema"])
    assert same(step.optimizer.state_dict()["state"], state["optimizer"]["state"])


def test_train_step_keeps_consistent_figures(bench):
    pytest.importorskip("diffusers")
    names = ["ours", "ours, plain", "diffusers"]
    lines, said = bench(train_step, "--batches 2 3 --rounds 2 --cpu_time --variants plain --peers diffusers")
    assert [(line["batch"], line["name"]) for line in lines] == [(batch, name) for batch in (2, 3) for name in names]
    for line in lines:
        low, high = line["milliseconds_quartiles"]
        assert low <= line["milliseconds"] <= high
        assert line["images_per_second"] * line["milliseconds"] == pytest.approx(1000 * line["batch"])
        assert line["gflop_per_second"] == pytest.approx(line["images_per_second"] * 3 * line["forward_gflop"])
        assert line["share_of_matmul"] == pytest.approx(line["gflop_per_second"] / 1000 / line["matmul_tflops"])
        assert line["over_ours"] == 1 or line["name"] != "ours"
    assert [line.split(" | ")[1] for line in said.out.splitlines() if line.startswith("| ")] == ["name", *names, *names]


SWAPPED = {name for name in train_step.VARIANTS if name.startswith("no-")} - {"no-mix-order"}
SWAPPED |= {"plain", "four-product", "lean"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_variant_changes_the_time_and_not_the_weights(precision, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # a compiler takes minutes
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # a variant sets it
    s = resolve(config, shlex.split(f"{common.TINY} --device cpu --precision {precision} --learning_rate 1e-3")).settings
    images, weights = common.random_images(40, s.IMAGE_SIZE), {}
    for name in train_step.VARIANTS:
        try:
            step = train_step.Step(s, torch.device("cpu"), images, name)
        except AssertionError:
            assert precision == "fp32" and name in ("no-LowPrecisionNorm", "no-QuickNorm", "no-FormulaAttention")
            continue
        start = torch.cat([parameter.detach().flatten() for parameter in step.model.parameters()])
        for _ in range(5):
            step()
        weights[name] = torch.cat([parameter.detach().flatten() for parameter in step.model.parameters()]) - start
    ours = weights["as train.py"]
    for name, moved in weights.items():
        apart = ((moved - ours).norm() / ours.norm()).item()
        assert apart < (0.0 if name not in SWAPPED else 1e-3 if precision == "fp32" else 0.2) + 1e-12, (name, apart)


@pytest.mark.parametrize("name", ["loss-graphs", "lean"])
def test_a_compiled_variant_is_one_graph_for_all_steps(name, monkeypatch):
    torch._dynamo.reset()
    count, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: compile_function(call, backend=count, fullgraph=True))
    monkeypatch.setattr(train_step, "should_compile", lambda *_: True)
    words = f"{common.TINY} --dim_mults 1 --attention_resolutions 0 --precision bf16 --device cpu"
    s = resolve(config, shlex.split(words)).settings
    step = train_step.Step(s, torch.device("cpu"), common.random_images(40, s.IMAGE_SIZE), name)
    for _ in range(3):
        step()
    assert count.frame_count == 1
    torch._dynamo.reset()


def test_plain_is_the_network_of_model_py_and_no_x_is_plain_in_one_place():
    s = resolve(config, shlex.split(f"{common.TINY} --device cpu --precision bf16")).settings
    kinds = {}
    for name in ("plain", "as train.py", "no-QuickNorm", "no-FourProductUpsample"):
        step = train_step.Step(s, torch.device("cpu"), common.random_images(4, s.IMAGE_SIZE), name)
        kinds[name] = {type(module) for module in step.model.modules()}
    assert kinds["plain"] == {type(module) for module in build_model(s, 10).modules()}
    assert kinds["as train.py"] - kinds["no-QuickNorm"] == {kernels.QuickNorm}
    assert kinds["as train.py"] - kinds["no-FourProductUpsample"] == {kernels.FourProductUpsample}
    assert kinds["no-FourProductUpsample"] - kinds["as train.py"] == {plain.Upsample}


def test_what_fails_is_named_and_the_others_keep_their_figures(bench):
    lines, said = bench(train_step, "--rounds 1 --peers --variants no-QuickNorm eager --train_flags='--precision fp32'")
    assert [line["name"] for line in lines] == ["ours", "ours, eager"]
    assert "ours, no-QuickNorm is left out: AssertionError: the step has no such modules" in said.err


def test_drawing_is_measured_and_its_kernels_are_listed(bench, monkeypatch):
    monkeypatch.setattr(train_step, "DRAWN", 2)
    lines, said = bench(train_step, "--draw ddim dpm++ --rounds 1 --profile")
    assert [line["name"] for line in lines] == [f"ours, 2 steps of {sampler}" for sampler in ("ddim", "dpm++")]
    assert said.out.count("Self CPU time total") == 2 and "convolution" in said.out


def test_gpu_keeps_what_each_row_printed_and_goes_on_with_the_first_that_is_not_done(bench, monkeypatch, tmp_path):
    def rows(*calls):
        return [(name, seconds, f"-c {shlex.quote(call)} -m benchmarks") for name, seconds, call in calls]

    wrong, sleep = "raise SystemExit('no such thing')", "import time; time.sleep(60)"
    first = [("quick", 60, "print(1)"), ("wrong", 60, wrong), ("endless", 1, f"print(2); {sleep}")]
    monkeypatch.setitem(gpu.TINY, "-c", "")
    monkeypatch.setattr(gpu, "LEAST", 1)
    monkeypatch.setattr(gpu, "ROWS", rows(*first))
    bench(gpu)
    monkeypatch.setattr(gpu, "ROWS", rows(*first, ("last", 60, f"print(3); {sleep}"), ("never", 60, "print(5)")))
    _, said = bench(gpu, "--minutes 0.04")
    assert "The same command goes on with 'never'" in said.out
    monkeypatch.setattr(gpu, "ROWS", rows(*first, ("last", 60, "print(4)"), ("never", 60, "print(5)")))
    lines, _ = bench(gpu)
    names = ["quick", "wrong", "endless", "last", "last", "never"]
    outcomes = ["done", "failed (1)", "stopped at its limit", gpu.CUT, "done", "done"]
    assert [(line["row"], line["outcome"]) for line in lines] == list(zip(names, outcomes))
    document = (tmp_path / "gpu.md").read_text()
    assert all(f"\n{text}\n" in document for text in (1, 2, 3, 4, 5, "no such thing"))


def test_the_rows_of_gpu_are_known_to_what_they_run(monkeypatch, tmp_path):
    for is_tiny, (_, _, words) in product((False, True), gpu.ROWS):
        args = common.argparse.Namespace(tiny=is_tiny, device="cpu", results=tmp_path, data_path=tmp_path / "a b")
        _, *words = gpu.command(args, words, str(tmp_path))
        if words[0] == "train.py":
            assert resolve(config, words[1:]).settings.DATA_PATH.endswith("/a b")
        elif words[1] != "pytest":
            asked = []
            monkeypatch.setattr(sys, "argv", words[1:])
            assert common.main("", "", asked.append, sys.modules[words[1]].FLAGS) == 0 and asked[0].tiny == is_tiny


def test_gpu_train_takes_the_width_that_the_speed_and_16_megabytes_allow():
    args = common.argparse.Namespace(device="cpu", minutes=4, tiny=False, train_flags="")
    nature = [resolve(config, ["--preset=nature", f"--unet_dim={width}"]).settings for width in range(32, 128, 8)]
    sizes = {s.UNET_DIM: 2 * parameter_count(build_model(s, 10)) for s in nature}
    assert max(width for width, size in sizes.items() if size <= 16e6) == gpu_train.recipe(args, 1e9)[1].UNET_DIM
    assert gpu_train.recipe(args, 1)[1].UNET_DIM == resolve(config, ["--preset=nature"]).settings.UNET_DIM


def test_gpu_train_brings_back_weights_pictures_and_curves(bench, run, monkeypatch, tmp_path, pictures):
    monkeypatch.setattr(gpu_train, "limited", lambda seconds, words, **_: ended(run.start(*words[1:]), 0))
    here = common.argparse.Namespace(tiny=True, results=tmp_path)
    common.Table("train_step", here, torch.device("cpu")).add(name="ours", gflop_per_second=1.0)
    flags = "--dataset folder --classes= --image_size 8 --unet_dim 8 --dim_mults 1 --num_samples 4 --preview_steps 2"
    (line,), _ = bench(gpu_train, f"--minutes 0 --data_path {pictures} --train_flags='{flags}'")
    assert (line["steps"], line["pictures"]) == (1, 2)
    assert line["validation_losses"] == [list(point) for point in common.curve(tmp_path, "loss/val")] != []
    assert torch.load(tmp_path / "weights.pth", weights_only=True)["ema"]["stem.weight"].dtype == torch.float16
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (20, 8, 8, 3) and (tmp_path / "grid.png").exists()


def test_what_travels_is_a_tiny_imagenet_of_the_classes_of_nature(tmp_path):
    for split, wnid in product(("train", "val"), ["n00000001", *reversed(pack.IDS)]):
        (folder := tmp_path / "all" / split / wnid / "images").mkdir(parents=True)
        (folder / f"{split}_{wnid}.JPEG").touch()
        with open(tmp_path / "all" / "wnids.txt", "a") as file:
            file.write(f"{wnid}\n")
    pack.take_pictures(tmp_path / "all", tmp_path / "ten")
    for split in ("train", "val"):
        assert (taken := TinyImageNet(tmp_path / "ten", split)).class_ids == pack.IDS and taken.labels == list(range(10))


def test_equal_time_trains_draws_and_judges_each_once(bench, run, monkeypatch, tmp_path, pictures):
    for name in ("diffusers", "denoising_diffusion_pytorch"):
        pytest.importorskip(name)
    monkeypatch.setattr(equal_time, "limited", lambda seconds, words, **_: ended(run.start(*words[1:]), 0))
    monkeypatch.setattr(equal_time, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which it sets
    flags = "--dataset folder --classes= --image_size 8 --unet_dim 8 --dim_mults 1 --attention_resolutions 0 --preview_steps 2"
    flags += f" --cache_path {tmp_path} --output_path {tmp_path}"
    words = f"--minutes 0.001 --count 12 --data_path {pictures} --train_flags='{flags}'"
    for _ in range(2):
        lines, _ = bench(equal_time, words)
        assert [line["name"] for line in lines] == equal_time.NAMES
    for line in lines:
        assert 0 < line["steps"] <= line["planned"] and line["pictures_seen"] == 2 * line["steps"]
        assert (line["frechet, own sampler"] == line["frechet, dpm++"]) == (line["name"] == "ours")
    assert (tmp_path / "equal_time" / "sheet.png").exists()
    lines, _ = bench(equal_time, words.replace("--unet_dim 8", "--unet_dim 16"))
    assert len(lines) == 10 and lines[5]["params_millions"] > lines[0]["params_millions"]  # other flags train anew
    (tmp_path / "equal_time.jsonl").unlink()
    monkeypatch.setattr(equal_time, "train", None)
    lines, _ = bench(equal_time, words)  # from the trained networks that are kept
    assert [line["name"] for line in lines] == equal_time.NAMES
