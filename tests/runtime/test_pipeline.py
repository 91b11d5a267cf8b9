"""Drawing from a checkpoint: what the scripts share."""

import pytest
import torch
from tqdm import tqdm

import sample
from src.runtime.pipeline import Pipeline


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_compiled_network_meets_one_shape_and_draws_the_same_pictures(trained, is_compiled):
    checkpoint = trained.folder / "checkpoints" / "best.pth"
    pipeline = Pipeline(
        sample.read_flags(["--checkpoint", str(checkpoint), "--steps", "2", "--device", "cpu", "--compile", "false"])
    )
    plain = torch.cat([pictures for _, pictures in pipeline.series(0, range(5), 5, tqdm(disable=True))])

    network, sizes = pipeline.network, set()

    def counted(x, t, y):
        sizes.add(len(x))
        return network(x, t, y)

    pipeline.network, pipeline.is_compiled = counted, is_compiled
    numbers, pictures = zip(*pipeline.series(0, range(5), 2, tqdm(disable=True)))
    assert [number for batch in numbers for number in batch] == [0, 1, 2, 3, 4]
    assert (torch.cat(pictures).int() - plain.int()).abs().max() <= 1  # grey level
    assert sizes == ({2} if is_compiled else {2, 1})
