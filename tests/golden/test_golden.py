"""The program gives what it gave: the facts of facts.json (see record.py), to the last bit on the machine that wrote them."""

import json

import numpy as np
import pytest

from tests.golden.record import FOLDER, REFUSALS, RUNS, machine, record

FACTS = json.loads((FOLDER / "facts.json").read_text())
IS_SAME_MACHINE = FACTS["machine"] == machine()  # elsewhere sums are taken in another order


@pytest.fixture(scope="module")
def facts(zygote, tmp_path_factory):
    return record(zygote, tmp_path_factory.mktemp("golden"))  # the refusals are checked there


@pytest.mark.parametrize("name", FACTS["runs"])
def test_training_gives_the_weights_it_gave(facts, name):
    now, before = facts["runs"][name], FACTS["runs"][name]
    assert {key: now[key] for key in ("shapes", "step", "epoch", "classes")} == {
        key: before[key] for key in ("shapes", "step", "epoch", "classes")
    }
    assert now["norms"] == pytest.approx(before["norms"], rel=1e-3)
    assert now["best_loss"] == pytest.approx(before["best_loss"], rel=1e-3)
    if IS_SAME_MACHINE:
        assert now["hashes"] == before["hashes"]


@pytest.mark.parametrize("name", [*RUNS])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(facts, name):
    assert facts["runs"][f"{name}, resumed after 13 steps"] == facts["runs"][name]


def test_a_checkpoint_of_version_1_goes_on_as_it_would_have(facts):
    assert facts["runs"]["version 1, resumed"]["step"] == 30


@pytest.mark.parametrize("name", FACTS["pictures"])
def test_sampling_gives_the_pictures_it_gave(facts, name):
    now, before = (
        [np.frombuffer(bytes.fromhex(picture), dtype=np.uint8).astype(int) for picture in some["pictures"][name]]
        for some in (facts, FACTS)
    )
    assert abs(np.array(now) - np.array(before)).max() <= (0 if IS_SAME_MACHINE else 2)


@pytest.mark.parametrize("name", FACTS["figures"])
def test_evaluation_gives_the_figures_it_gave(facts, name):
    assert facts["figures"][name] == pytest.approx(FACTS["figures"][name], rel=1e-6 if IS_SAME_MACHINE else 1e-2)


def test_refusals_are_those_recorded(facts):
    assert len(facts["refusals"]) == len(REFUSALS)
    assert {words: code for words, (code, _) in facts["refusals"].items()} == {
        words: code for words, (code, _) in FACTS["refusals"].items()
    }
