"""That the benchmarks run, keep what they promise to keep, and measure the step that train.py takes."""

import json
import shlex
import sys
import weakref

import pytest
import torch

import config
from benchmarks import data, loop, profile_step, sample, start, train_step
from benchmarks.common import forward_gflop, main, some_of, table
from benchmarks.ours import Step
from benchmarks.peers import diffusers_unet
from src.dataset import prepare
from src.model import UNet, parameter_count
from src.runtime.build import build_model
from src.runtime.settings import resolve
from src.utils import UserError
from tests.runs import same

FACTS = {"command", "hardware", "threads", "torch", "commit", "date", "tiny"}


@pytest.fixture(autouse=True)
def one_thread():
    """As the runs of tests/runs.py have, to the last bit; and beside other processes a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """bench(module, flags...) runs a benchmark in its tiny form on the CPU: (the exit code, its JSON lines, what it said)."""

    def run(module, *flags):
        script = module.__name__.split(".")[-1]
        words = [script, "--tiny", "--device", "cpu", "--results", str(tmp_path), *flags]
        monkeypatch.setattr(sys, "argv", words)
        code = main(script, module.__doc__, module.FLAGS, module.measure)
        path = tmp_path / f"{script}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return code, lines, capsys.readouterr()

    return run


def cells(out):
    """The Markdown table that was printed, as lists of words."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]


# --- FLOPs --------------------------------------------------------------------------------------------


def test_the_default_network_takes_60_6_gflop_an_image():
    settings = resolve(config, []).settings
    with torch.device("meta"):
        model = UNet(settings.IMAGE_SIZE, settings.UNET_DIM, settings.DIM_MULTS, settings.NUM_RES_BLOCKS)
    assert parameter_count(model) == pytest.approx(92.0e6, rel=0.01)
    assert forward_gflop(build_model(settings, 200), 64) == pytest.approx(60.6, rel=0.01)


def test_flops_are_two_per_multiplication():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x, t):
            return self.conv(x)

    assert forward_gflop(Network(), 8) == pytest.approx(2 * 8 * 8 * 3 * 5 * 3 * 3 / 1e9)


def test_diffusers_has_the_same_shape_as_ours():
    settings = resolve(config, ["--unet_dim", "32", "--image_size", "32", "--attention_resolutions", "16,8"]).settings
    ours, theirs = (forward_gflop(model, 32) for model in (build_model(settings, 1), diffusers_unet(settings)))
    assert theirs == pytest.approx(ours, rel=0.01)


# --- the training step --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"GRAD_ACCUM_STEPS": 2, "CLASS_CONDITIONAL": True, "PREDICTION": "v"}])
def test_the_step_that_is_measured_is_the_one_that_train_py_takes(run, pictures, changes):
    run.train(max_steps=3, **changes)
    state = run.state()
    settings = resolve(config, run.flags(**changes)).settings
    images = prepare("folder", pictures, "train", settings.IMAGE_SIZE, settings.CACHE_PATH, 0)
    step = Step(settings, torch.device("cpu"), images)
    for _ in range(3):
        step()
    assert same(step.model.state_dict(), state["model"])
    assert same(step.ema.model.state_dict(), state["ema"])
    assert same(step.optimizer.state_dict()["state"], state["optimizer"]["state"])


def test_train_step_keeps_consistent_figures(bench):
    words = ["--only", "ours,diffusers", "--batches", "2,3", "--rounds", "3"]
    code, lines, said = bench(train_step, *words)
    assert code == 0, said.err
    names = ["ours", "diffusers, script", "diffusers, best"]
    assert [(line["batch"], line["name"]) for line in lines] == [(batch, name) for batch in (2, 3) for name in names]
    for line in lines:
        assert line["command"] == "python -m benchmarks.train_step --tiny --device cpu " + shlex.join(words)
        assert set(line) > FACTS | {"params_millions", "peak_gib", "seconds_to_first_step", "matmul_tflops", "order"}
        low, high = line["milliseconds_quartiles"]
        assert low <= line["milliseconds"] <= high
        assert line["images_per_second"] * line["milliseconds"] == pytest.approx(1000 * line["batch"])
        assert line["gflop_per_second"] == pytest.approx(line["images_per_second"] * 3 * line["forward_gflop"])
        assert line["share_of_matmul"] == pytest.approx(line["gflop_per_second"] / 1000 / line["matmul_tflops"])
        assert line["rounds"] == 3
    assert all(line["ours_per_flop"] == 1 for line in lines if line["name"] == "ours")
    head, _, *rows = cells(said.out)
    assert head == list(train_step.COLUMNS)
    assert [row[:2] for row in rows] == [[str(line["batch"]), line["name"]] for line in lines]


def test_a_contestant_that_fails_is_named_and_the_others_stay(bench, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(train_step.STEPS, "diffusers", broken)
    code, lines, said = bench(train_step, "--only", "ours,diffusers", "--modes", "script")
    assert code == 0
    assert [line["name"] for line in lines] == ["ours"]
    assert "diffusers, script is left out: RuntimeError: no such kernel" in said.err


def test_contestants_that_do_not_fit_together_run_one_after_the_other(bench, monkeypatch):
    start_alone = train_step.Contestant.start
    living = []

    def start(self, device):
        if [step for step in living if step() is not None]:
            raise torch.OutOfMemoryError("out of memory")
        step = start_alone(self, device)
        living.append(weakref.ref(step))
        return step

    monkeypatch.setattr(train_step.Contestant, "start", start)
    code, lines, said = bench(train_step, "--only", "ours,diffusers", "--modes", "script", "--rounds", "4")
    assert code == 0
    assert [(line["name"], line["rounds"]) for line in lines] == [("ours", 4), ("diffusers, script", 4)], said.err
    assert lines[0]["order"] == "one after the other, there and back (1 of 2 fit together)"


# --- the others ---------------------------------------------------------------------------------------


def test_loop_runs_train_py_in_turns_with_the_bare_step(bench):
    code, (line,), said = bench(loop, "--rounds", "2", "--steps", "3")
    assert code == 0, said.err
    assert line["loop_images_per_second"] > 0 and line["bare_images_per_second"] > 0
    assert line["overhead_percent"] > -100
    assert (line["rounds"], line["steps"]) == (2, 3)


def test_loop_compares_each_stretch_with_its_bare_neighbours():
    watch = loop.Stopwatch(None, None, None, rounds=2, steps=1)
    watch.bare, watch.loop = [9.0, 1.0, 3.0, 5.0], [9.0, 3.0, 4.0]  # the first of each warms up
    assert watch.overheads() == pytest.approx([50, 0])


def test_sample_says_what_it_extrapolates(bench):
    code, lines, said = bench(sample, "--samplers", "ddim,dpm++", "--most_steps", "20", "--modes", "best", "--rounds", "1")
    assert code == 0, said.err
    assert [(line["sampler"], line["name"]) for line in lines] == [
        (sampler, name) for sampler in ("ddim", "dpm++") for name in ("ours", "diffusers, best")
    ]
    assert [line["measured"] for line in lines] == ["20 steps, extrapolated"] * 2 + ["all"] * 2


def test_data_prepares_and_reads_in_turns_with_a_dataloader(bench):
    code, lines, said = bench(data, "--image_size", "16", "--rounds", "1")
    assert code == 0, said.err
    speeds = {line["name"]: line["images_per_second"] for line in lines}
    assert len(speeds) == 5
    assert speeds["ours, from the cache"] > speeds["PIL + DataLoader, no workers"]


def test_profile_accounts_for_the_whole_step(bench):
    code, lines, said = bench(profile_step)
    assert code == 0, said.err
    kinds = {line["name"].strip("*"): line["share"] for line in lines if line["section"] == "kind"}
    assert kinds.pop("the step") == 1
    assert sum(kinds.values()) == pytest.approx(1)
    assert kinds["convolutions"] > 0.05 and kinds["optimizer, EMA, clipping"] > 0


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816wgrad_optimized_bf16_256x128>", "convolutions"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul, attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "matmul, attention"),
        ("triton_red_fused__to_copy_convolution_native_group_norm_3", "norms, activations, elementwise"),
        ("triton_tem_fused_convolution_7", "convolutions"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer, EMA, clipping"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "copies, casts"),
        ("Memcpy DtoD (Device -> Device)", "copies, casts"),
    ],
)
def test_profile_tells_kernels_by_their_names(kernel, kind):
    assert profile_step.kind_of(kernel) == kind


def test_start_sees_the_first_step_before_the_process_ends(tmp_path):
    words = "--dataset shapes --image_size 8 --unet_dim 8 --dim_mults 1 --attention_resolutions 0 --num_workers 0 --device cpu"
    seconds, whole = start.seconds_to_step(tmp_path, "1", 1, words.split())
    assert 0 < seconds <= whole
    assert (tmp_path / "1" / "latest.pth").exists()


def test_start_says_why_a_run_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit('no such thing')")
    with pytest.raises(UserError, match="exit code 1: no such thing"):
        start.seconds_to_step(tmp_path, "1", 1, [])


# --- tables and refusals ------------------------------------------------------------------------------


def test_a_table_has_a_dash_for_what_is_not_known():
    printed = table({"what": "name", "GiB": "{gib:.2f}"}, [{"name": "ours", "gib": 1.234}, {"name": "theirs", "gib": None}, {}])
    assert printed.splitlines() == ["| what | GiB |", "|---|---|", "| ours | 1.23 |", "| theirs | - |", "| - | - |"]


def test_bad_flags_are_refused_in_one_sentence(bench):
    for module, flags, sentence in [
        (train_step, ["--only", "ours,theirs"], "--only: got 'ours,theirs', expected some of ours, diffusers, lucidrains"),
        (train_step, ["--variant", "graphs"], "--variant: no such flag; did you mean --variants?"),
        (loop, ["--train_flags=--no_such_flag 1"], "--no_such_flag: no such flag"),
    ]:
        code, lines, said = bench(module, *flags)
        assert (code, lines) == (2, [])
        assert sentence in said.err and "Traceback" not in said.err


def test_some_of_takes_a_list_or_nothing():
    rule = some_of(["a", "b"])
    assert rule.accept("b,a") == ("b", "a")
    assert rule.accept("") == ()
