"""Drawing from a checkpoint: what the scripts share."""

from functools import partial

import pytest
import torch

import evaluate
import sample
from src.runtime.device import computes_in_bf16
from src.runtime.distributed import World
from src.runtime.pipeline import Pipeline
from src.utils import FlagError


def pipeline_of(run, *words: str, script=sample) -> Pipeline:
    return Pipeline(script.read_flags(["--checkpoint", str(run.folder / "checkpoints/best.pth"), "--device", "cpu", *words]))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_compiled_network_meets_one_shape_and_draws_the_same_pictures(trained, is_compiled):
    pipeline = pipeline_of(trained, "--steps", "2", "--compile", "false")
    start = partial(pipeline.start, 0)
    plain = torch.cat([pictures for _, pictures in pipeline.series(range(11), 11, start)])

    network, sizes = pipeline.network, set()

    def counted(x, t, y):
        sizes.add(len(x))
        return network(x, t, y)

    pipeline.network, pipeline.is_compiled = counted, is_compiled
    numbers, pictures = zip(*pipeline.series(range(11), 5, start))
    assert [number for batch in numbers for number in batch] == [*range(11)]
    assert (torch.cat(pictures).int() - plain.int()).abs().max() <= 1  # grey level
    assert sizes == ({5} if is_compiled else {5, 4})  # a CPU draws four at least


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_batch_size_changes_no_picture_in_either_precision(precision):
    """Guidance magnifies what rounds otherwise: with a batch of one as it is, 71 grey levels in bf16."""
    if precision == "bf16" and not computes_in_bf16(torch.device("cpu")):
        pytest.skip("this CPU emulates bf16")
    flags = f"--checkpoint docs/shapes.pth --guidance 4 --steps 10 --device cpu --precision {precision}"
    pipeline = Pipeline(sample.read_flags(flags.split()))
    start = partial(pipeline.start, 0)
    by_size = [torch.cat([pictures for _, pictures in pipeline.series(range(5), size, start)]).int() for size in (5, 1, 2)]
    assert max((pictures - by_size[0]).abs().max() for pictures in by_size) <= 1


@pytest.mark.parametrize("each, most", [(0.001, 64), (0.02, 4)])  # 64 pictures in 74 ms; 1.3 s, which is too long to try
def test_the_forecast_rests_on_several_calls_and_on_the_usual_batch_where_that_is_quick(trained, monkeypatch, each, most):
    pipeline = pipeline_of(trained)
    clock, sizes = [0.0], []
    monkeypatch.setattr("src.runtime.pipeline.time.perf_counter", lambda: clock[0])

    def network(x, t, y):
        sizes.append(len(x))
        clock[0] += (0.01 + each * len(x)) * ([1, 3, 1, 1, 1][len(sizes) % 5] if len(sizes) > 1 else 100)  # one in five is slow

    pipeline.network = network
    seconds = pipeline.prepare(640, 64) / (640 * pipeline.steps)
    assert sizes[-1] == most and len(sizes) > 5
    assert seconds == pytest.approx((0.01 / most + each) * 1.4, rel=0.2)


@pytest.mark.parametrize(
    ("flags", "count", "processes", "calls"),
    [
        ("", 64, 1, 20),
        ("", 50_000, 1, 782 * 20),
        ("", 50_000, 8, 782 * 20 / 8),
        ("--sampler ddpm --steps 50", 640, 1, 500),
        ("--guidance 2", 65, 1, 80),
        ("--compile true", 64, 1, 0),
    ],
)
def test_the_network_is_compiled_for_as_many_calls_as_drawing_takes(
    trained_with_classes, monkeypatch, flags, count, processes, calls
):
    asked = []
    monkeypatch.setattr("src.runtime.pipeline.should_compile", lambda choice, device, calls: bool(asked.append(calls)))
    monkeypatch.setattr(Pipeline, "seconds_per_call", lambda *_: 1.0)
    pipeline = pipeline_of(trained_with_classes, *flags.split())
    pipeline.world = World(size=processes)
    pipeline.prepare(count, 64)
    assert asked == ([0] if flags == "--compile true" else [0, calls])


@pytest.mark.parametrize("guidance", [0, 2.5])
def test_guidance_needs_a_network_that_has_seen_hidden_labels(trained_with_classes, tmp_path, guidance):
    state = trained_with_classes.state("best")
    state["config"]["LABEL_DROPOUT"] = 0.0
    torch.save(state, tmp_path / "all_labels.pth")
    all_labels = ["--checkpoint", str(tmp_path / "all_labels.pth")]
    for script in (sample, evaluate):
        with pytest.raises(FlagError, match=rf"--guidance: got {guidance}, .* LABEL_DROPOUT 0.*Allowed is 1;"):
            pipeline_of(trained_with_classes, "--guidance", str(guidance), *all_labels, script=script)
        pipeline_of(trained_with_classes, "--guidance", "1", *all_labels, script=script)
        pipeline_of(trained_with_classes, "--guidance", str(guidance), script=script)
