"""Several processes do what one does: real ones, which meet over gloo as torchrun's do, and torchrun itself."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from src.runtime.distributed import World
from src.utils import UserError
from tests.runs import ROOT, Process, Runner, differences, ended, signal_at

# Ten epochs of 5 steps, 16 images each, a point of the curves after every step.
STEPS_50 = {"IMAGE_SIZE": 16, "DIM_MULTS": (1, 2), "ATTENTION_RESOLUTIONS": (8,), "BATCH_SIZE": 16, "LOG_EVERY": 1}
STEPS_50 |= {"EPOCHS": 10, "SAMPLE_EVERY": 5, "SAVE_EVERY": 5, "NUM_SAMPLES": 6, "VAL_IMAGES": 4}


def start_all(run: Runner, script: str, argvs: list[list[str]], setups: dict[int, str] | None = None) -> list[Process]:
    """A process of a script for each list of words, with the variables by which torchrun tells them who they are."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank, argv in enumerate(argvs):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(argvs), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        setup = f"import os; os.environ |= { ({name: str(value) for name, value in names.items()}) }\n"
        processes.append(run.start(script, *argv, setup=setup + (setups or {}).get(rank, ""), name=f"_{rank}"))
    return processes


def train_all(run: Runner, size: int, codes: list[int] | None = None, setups: dict[int, str] | None = None, **changes):
    """A whole run of train.py in `size` processes."""
    processes = start_all(run, "train.py", [run.flags(**changes)] * size, setups)
    return [ended(process, code) for process, code in zip(processes, codes or [0] * size)]


@pytest.fixture(scope="session")
def alone(zygote, pictures, tmp_path_factory) -> Runner:
    """The run of 50 steps by one process. Only to be read."""
    runner = Runner(zygote, tmp_path_factory.mktemp("alone"), pictures)
    runner.train(**STEPS_50)
    return runner


@pytest.fixture(scope="session")
def pair(zygote, pictures, tmp_path_factory) -> Runner:
    """The same by two. Only to be read."""
    runner = Runner(zygote, tmp_path_factory.mktemp("pair"), pictures)
    train_all(runner, 2, **STEPS_50)
    return runner


def assert_nearly_the_same_run(run: Runner, other: Runner) -> None:
    """Every point of every curve but for float32 rounding, which Adam makes larger from step to step, and the grids."""
    curves, others = run.scalars(), other.scalars()
    assert curves.keys() == others.keys()
    for tag, points in curves.items():
        steps, values = zip(*points)
        assert steps == tuple(step for step, _ in others[tag]), tag
        np.testing.assert_allclose(values, [value for _, value in others[tag]], rtol=2e-4, atol=1e-6, err_msg=tag)
    assert len(curves["loss/train"]) == 50
    grids = sorted(run.folder.rglob("samples/*.png"))
    assert [grid.name for grid in grids] == ["epoch_005.png", "epoch_010.png"]
    for grid in grids:
        mine, its = (np.array(Image.open(r.folder / grid.relative_to(run.folder)), dtype=int) for r in (run, other))
        assert mine.std() > 10, "the grid shows nothing"
        assert np.abs(mine - its).max() <= 1


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_losses_and_the_grid_of_one(run, alone, size):
    first, *others = train_all(run, size, **STEPS_50)
    assert f"{size} processes of {16 // size} images each" in first.out
    assert all(other.out == other.err == "" for other in others), "only the first talks"
    assert_nearly_the_same_run(run, alone)
    assert len(list(run.folder.rglob("events.out*"))) == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(run, alone, before, after):
    for size, setup, code in ((before, signal_at(22, 0, "SIGTERM"), 143), (after, "", 0)):
        if size == 1:
            run.train(setup, code=code, **STEPS_50)
        else:
            train_all(run, size, codes=[code] * size, setups={0: setup}, **STEPS_50)
    assert_nearly_the_same_run(run, alone)


def test_the_first_points_after_a_resume_are_means_over_all_processes(run):
    settings = STEPS_50 | {"LOG_EVERY": 4, "EPOCHS": 2}
    whole, parts = run.to("whole"), run.to("parts")
    whole.train(**settings)
    stop = {0: signal_at(5, 0, "SIGTERM")}  # two steps into the mean that is shown after step 8
    train_all(parts, 2, codes=[143, 143], setups=stop, **settings)
    train_all(parts, 2, **settings)
    for tag, points in whole.scalars().items():
        assert [value for _, value in parts.scalars()[tag]] == pytest.approx([value for _, value in points], rel=1e-4), tag


COUNT_MESSAGES = """
import atexit, torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP

count, make = 0, DDP.__init__

def counted(state, bucket):
    global count
    count += 1
    return allreduce_hook(state, bucket)

def make_counted(self, *args, **options):
    make(self, *args, **options)
    self.register_comm_hook(None, counted)

DDP.__init__ = make_counted
import src.runtime.distributed
leave = src.runtime.distributed.dist.destroy_process_group
src.runtime.distributed.dist.destroy_process_group = lambda: (print("messages", count), leave())
"""


def test_accumulated_gradients_are_sent_once_a_step_and_are_those_of_one_process(run):
    settings = STEPS_50 | {"BATCH_SIZE": 4, "GRAD_ACCUM_STEPS": 4, "EPOCHS": 2}
    whole, parts = run.to("whole"), run.to("parts")
    whole.train(**settings)
    first, _ = train_all(parts, 2, setups={0: COUNT_MESSAGES}, **settings)
    steps, buckets = 10, 1  # all of the small network's gradients fit into one
    assert f"messages {steps * buckets}\n" in first.out
    losses = [value for _, value in whole.scalars()["loss/train"]]
    assert [value for _, value in parts.scalars()["loss/train"]] == pytest.approx(losses, rel=1e-4)


# In the process itself, for speed; all but the last of what torch.compile does, generating code.
COMPILED = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='aot_eager')"


def test_compiled_networks_in_two_processes_give_the_losses_and_the_grid_of_one_that_is_not(run, alone):
    first, _ = train_all(run, 2, setups={0: COMPILED, 1: COMPILED}, **STEPS_50 | {"COMPILE": True})
    assert "COMPILE true" in first.out
    assert_nearly_the_same_run(run, alone)


# --- faults -------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_resume_is_the_uninterrupted_run(run, pair):
    first, second = train_all(run, 2, codes=[143, 143], setups={1: signal_at(12, 0, "SIGTERM")}, **STEPS_50)
    assert "Stopped after step 13 of 50" in first.out and first.err == ""
    assert second.err.strip() == "SIGTERM: finishing the step, then saving. A second Ctrl-C stops at once."
    train_all(run, 2, **STEPS_50)
    assert differences(run.state(), pair.state()) == []
    assert run.scalars() == pair.scalars()


NOT_FINITE = """
from src.diffusion import GaussianDiffusion
calls, losses = 0, GaussianDiffusion.training_losses

def spoiled(self, *args, **options):
    global calls
    calls += 1
    return losses(self, *args, **options) * (float("inf") if calls == 8 else 1)

GaussianDiffusion.training_losses = spoiled
"""


def test_a_loss_that_is_not_finite_in_one_process_reaches_the_weights_of_none(run):
    first, second = train_all(run, 2, codes=[1, 1], setups={1: NOT_FINITE}, **STEPS_50)
    assert "step 8 is not finite" in first.err
    assert "step 8 is not finite" in second.err
    assert run.state()["step"] == 5


def test_a_batch_that_cannot_be_shared_is_refused_once(run):
    first, *others = train_all(run, 4, codes=[2] * 4, BATCH_SIZE=10)
    assert first.err.startswith("train.py: --batch_size: got 10")
    assert first.err.rstrip().endswith("allowed are multiples of 4, for example 8 or 12.")
    assert [other.err for other in others] == [""] * 3


def test_processes_that_would_go_on_from_different_steps_are_refused(run):
    run.train(max_steps=4)
    processes = start_all(run, "train.py", [run.flags(), run.flags(RUN="not_shared")])
    for process in processes:
        ended(process, 1)
        assert "do not agree on the step to go on from" in process.err
    train_all(run, 2, max_steps=5)  # as advised, on a folder that they share


NEVER = """
import torch.distributed as dist

def never(*args, **options):
    raise AssertionError("torch.distributed was used")

for name in ("init_process_group", "all_reduce", "barrier", "destroy_process_group", "broadcast"):
    setattr(dist, name, never)
"""


def test_one_process_alone_never_touches_torch_distributed(run):
    run.train(NEVER)
    run.sample("--checkpoint", "checkpoints/latest.pth", "--num_samples", 4, setup=NEVER)


# --- drawing and measuring ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_is_divided_is_all_there_once(size):
    shares = [World(rank, rank, size).shard(range(0, 13, 3)) for rank in range(size)]
    assert sorted(start for share in shares for start in share) == [0, 3, 6, 9, 12]


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_samples", "11", "--batch_size", "3", "--gif", "--npz"],
        ["--interpolate", "--interp_steps", "5", "--batch_size", "2"],
        ["--num_samples", "2", "--sampler", "ddpm", "--steps", "10"],  # one process has nothing to do
    ],
)
def test_two_processes_draw_the_pictures_of_one(run, trained, flags):
    words = ["--checkpoint", trained.folder / "checkpoints" / "latest.pth", *flags]
    run.sample(*words, "--output_dir", "one")
    processes = start_all(run, "sample.py", [["--device", "cpu", *words, "--output_dir", "two"]] * 2)
    first, second = (ended(process, 0) for process in processes)
    assert "Done in" in first.out
    assert second.out == second.err == ""
    ones, twos = run.to("one").files("*"), run.to("two").files("*")
    assert ones.keys() == twos.keys()
    for name in ones:
        if name.endswith(".png"):
            pixels = [np.array(Image.open(run.folder / folder / name), dtype=int) for folder in ("one", "two")]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1, name
    assert ones.get("labels.csv") == twos.get("labels.csv")


def test_two_processes_measure_what_one_measures(run, pair):
    words = ["--checkpoint", str(pair.folder / "checkpoints" / "latest.pth"), "--device", "cpu", "--loss", "--nll"]
    words += ["--nll_steps", "5", "--fid", "--features", "random", "--num_samples", "24", "--kid_subset_size", "8"]
    words += ["--batch_size", "5", "--reference", "train", "--nearest", "3", "--data_path", str(run.pictures)]
    reports = []
    for size in (1, 2):
        folder = ["--output_dir", f"out_{size}", "--cache_path", f"cache_{size}", "--log_path", f"logs_{size}"]
        for process in start_all(run, "evaluate.py", [[*words, *folder]] * size):
            ended(process, 0)
        (report,) = (run.folder / f"out_{size}").glob("*.json")
        reports.append(figures_of(json.loads(report.read_text())))
    one, two = reports
    assert one.keys() == two.keys()
    assert len(one) > 20
    assert two == pytest.approx(one, rel=1e-3, abs=1e-6)
    kept = [sorted(path.name for path in (run.folder / f"cache_{size}" / "fidelity").iterdir()) for size in (1, 2)]
    assert kept[0] == kept[1] and len(kept[0]) == 1, "one process writes, and leaves nothing half done"


def figures_of(value: object, name: str = "") -> dict[str, float]:
    """Every number in a report, by its dotted name, but for those of the protocol."""
    if isinstance(value, (dict, list)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        of_parts = [figures_of(inner, f"{name}.{key}") for key, inner in parts if key != "protocol"]
        return {name: number for found in of_parts for name, number in found.items()}
    return {name: value} if isinstance(value, (int, float)) and not isinstance(value, bool) else {}


# --- torchrun ---------------------------------------------------------------------------------------------


def torchrun(run: Runner, setup: str, *words: str, **changes) -> subprocess.CompletedProcess:
    """train.py in two processes under torchrun itself. setup: code that each process executes first."""
    run.folder.mkdir(exist_ok=True)
    script = run.folder / "under_torchrun.py"
    preamble = f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{setup}\n"
    script.write_text(preamble + f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words, str(script)]
    words = [*command, *run.flags(**changes)]
    return subprocess.run(words, cwd=run.folder, capture_output=True, text=True, timeout=120)


KILL_ONCE = """
import os, pathlib, signal
from src.dataset import TrainBatches
draw, sign = TrainBatches.__call__, pathlib.Path("killed")

def draw_and_die(self, step, micro):
    if step == 33 and os.environ["RANK"] == "1" and not sign.exists():
        sign.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(self, step, micro)

TrainBatches.__call__ = draw_and_die
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_was_killed_and_it_goes_on_by_itself(run, pair):
    done = torchrun(run, KILL_ONCE, "--max-restarts=1", **STEPS_50)
    assert done.returncode == 0, done.stderr
    assert (run.folder / "killed").exists()
    assert "going on after step 30" in done.stdout
    assert "(exitcode: -9) local_rank: 1 " in done.stderr and "Traceback" not in done.stderr  # the one that failed first
    assert differences(run.state(), pair.state()) == []
    assert run.scalars() == pair.scalars()


# --- what a cluster's environment may hold ----------------------------------------------------------------

JOB = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def set_environment(monkeypatch, values: dict[str, str | None]) -> None:
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("size", [None, "", "0", "1"])
@pytest.mark.parametrize("others", [{}, {"RANK": "3"}, {"RANK": "", "MASTER_PORT": "x"}])
def test_one_process_is_one_process_whatever_else_a_cluster_sets(monkeypatch, size, others):
    set_environment(monkeypatch, {"WORLD_SIZE": size, **others})
    with World.join() as world:
        assert world == World() and world.is_main


ODD = {**dict.fromkeys((None, ""), "is not set"), **dict.fromkeys(("x", "-1"), "expected a number")}


@pytest.mark.parametrize(
    "name, value, says",
    [
        *((name, value, says) for name in ("RANK", "LOCAL_RANK", "MASTER_PORT") for value, says in ODD.items()),
        *(("MASTER_ADDR", value, "is not set") for value in (None, "")),
        *(("WORLD_SIZE", value, "expected a number") for value in ("x", "-1")),
        ("RANK", "2", "expected a number below WORLD_SIZE=2"),
    ],
)
def test_several_processes_without_a_name_or_number_are_refused_in_a_sentence(monkeypatch, name, value, says):
    set_environment(monkeypatch, JOB | {name: value})
    with pytest.raises(UserError, match=rf"{name}.*{says}.*with torchrun.*unset WORLD_SIZE"), World.join():
        pass


def test_a_busy_port_is_told_as_a_busy_port(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        set_environment(monkeypatch, JOB | {"MASTER_PORT": str(server.getsockname()[1])})
        with pytest.raises(UserError, match=r"cannot meet at 127.0.0.1:\d+: the port is in use"), World.join():
            pass
