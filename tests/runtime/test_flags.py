"""The flags of all scripts: every number has a range, every path is expanded, every refusal is one sentence."""

import math
import re

import pytest
import torch

import config
import evaluate
import export
import sample
from src.runtime.device import pick_precision
from src.runtime.flags import ELSEWHERE, FlagParser, command_line
from src.runtime.settings import resolve
from src.utils import FlagError

SCRIPTS = {
    "train.py": lambda argv: resolve(config, argv),
    "sample.py": sample.read_flags,
    "evaluate.py": evaluate.read_flags,
    "export.py": export.read_flags,
}


class Found(Exception):
    pass


def parser_of(script: str) -> FlagParser:
    """The parser with which a script reads its flags."""

    def catch(self, argv):
        raise Found(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(FlagParser, "parse", catch)
        SCRIPTS[script]([])
    return found.value.args[0]


PARSERS = {script: parser_of(script) for script in SCRIPTS}


def flags_with(word: str) -> list:
    """(script, flag, what its value may be) of every flag that expects something with that word in it."""
    return [
        pytest.param(script, flag, action.type.__name__, id=f"{script} {flag}")
        for script, parser in PARSERS.items()
        for flag, action in parser._option_string_actions.items()
        if action.type and word in action.type.__name__
    ]


def refusal(parser: FlagParser, *argv: str) -> str:
    """The sentence with which these flags are refused, on one line."""
    with pytest.raises(FlagError) as caught:
        parser.parse(argv)
    sentence = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in sentence
    return sentence


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, flag, expected", flags_with("number"))
def test_every_number_has_a_range_and_what_lies_outside_is_refused(script, flag, expected):
    parser = PARSERS[script]
    if "whole" in expected:
        low, high = map(int, re.search(r"from (-?\d+) to (\d+)", expected).groups())
        inside, outside = [low, high], [low - 1, high + 1, 1.5]
    else:
        above, low, below, high = re.search(r"(above|of at least) (\S+) and (below|at most) (\S+)$", expected).groups()
        low, high = float(low), float(high)
        beyond = [math.nextafter(low, -1), math.nextafter(high, math.inf)]
        inside = [math.nextafter(low, 1) if above == "above" else low, math.nextafter(high, 0) if below == "below" else high]
        outside = beyond + [low] * (above == "above") + [high] * (below == "below")
    outside += ["", " ", "many", "nan", "inf", "-inf", "-NAN", "1e999", 10**30, -(10**30)]
    if "0 for none" in expected:
        outside = [value for value in outside if value not in (0, "", " ")]
    for value in inside:
        parser.parse([flag, str(value)])
    for value in outside:
        for argv in ([flag, str(value)], [f"{flag}={value}"]):
            assert refusal(parser, *argv) == f"{flag}: got {str(value)!r}, expected {expected}."


def test_there_are_numbers_to_check():
    scripts = [param.values[0] for param in flags_with("number")]
    assert len(scripts) > 40 and {*scripts, "export.py"} == SCRIPTS.keys()  # which has none


def test_the_pictures_of_interpolate_are_numbers_with_the_same_ranges():
    assert PARSERS["sample.py"].parse(["--interpolate", "3,5:7"]).interpolate == [(None, 3), (5, 7)]
    assert PARSERS["sample.py"].parse(["--interpolate"]).interpolate == "next"
    assert PARSERS["sample.py"].parse(["--interpolate", "1,2,0:3"]).interpolate == [(None, 1), (None, 2), (0, 3)]
    for bad in ("3", "1:2:3,4", "a,b", "-1,2", f"{2**32}:1,2", f"1,{10**30}", "nan,1", "", "1:,2"):
        assert refusal(PARSERS["sample.py"], "--interpolate", bad).startswith(f"--interpolate: got {bad!r}, expected two")


@pytest.mark.parametrize("script, flag, _", flags_with("a path"))
def test_every_path_is_expanded_or_refused(monkeypatch, script, flag, _):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "/big disk")
    monkeypatch.setenv("EMPTY", "")
    read = lambda path: getattr(PARSERS[script].parse([flag, path]), flag[2:])  # noqa: E731
    assert [read(path) for path in ("~", "~/a", "$PLACE/a", "${PLACE}s/$PLACE", "./a~b", "a/~")] == [
        "/home/me", "/home/me/a", "/big disk/a", "/big disks//big disk", "./a~b", "a/~",
    ]  # fmt: skip
    for path, part in {"$NOPE/a": "$NOPE", "a/${NOPE}": "${NOPE}", "$EMPTY/a": "$EMPTY", "~no-one/a": "~no-one"}.items():
        assert refusal(PARSERS[script], flag, path) == f"{flag}: got {path!r}, but {part} is not set."
    assert refusal(PARSERS[script], flag, "") == f"{flag}: got '', expected a path."


def test_a_path_that_exists_as_typed_is_that_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", "elsewhere")
    (tmp_path / "$5 and $PLACE").mkdir()
    for path, read in {"$5 and $PLACE": "$5 and $PLACE", "$5 and $PLACE/new/$PLACE": "$5 and $PLACE/new/elsewhere"}.items():
        assert PARSERS["train.py"].parse(["--data_path", path]).data_path == read
        assert PARSERS["train.py"].parse(["--data_path", str(tmp_path / path)]).data_path == str(tmp_path / read)
    assert "but $5 is not set" in refusal(PARSERS["train.py"], "--data_path", "$5 and more")


def test_every_flag_whose_name_says_that_it_is_a_path_is_one():
    named = re.compile(r"--(.*_(path|dir)|checkpoint|samples|reference|features|init_from)")
    flags = {(script, flag) for script, parser in PARSERS.items() for flag in parser._option_string_actions}
    assert {pair for pair in flags if named.fullmatch(pair[1])} == {param.values[:2] for param in flags_with("a path")}


def test_fp16_is_refused_on_a_device_that_turns_out_to_be_a_cpu():
    with pytest.raises(FlagError, match=r"^--precision fp16: the device is a CPU; allowed there are fp32 and bf16\.$"):
        pick_precision("fp16", torch.device("cpu"))
    assert pick_precision("fp16", torch.device("cuda")) == torch.float16


# --- flags that there are not -----------------------------------------------------------------------------


HINTS = {
    "train.py": {
        "--batch_size": "--batchsize=64 --batch-size --BATCH_SIZE -batch_size batch_size=64 --batch --bs --train_batch_size",
        "--learning_rate": "--lr --LR=1e-3 --learning-rate --learnign_rate --train_lr",
        "--device": "--gpu --gpus=0,1 --device_id --gpu-ids",
        "--epochs": "--epoch --n_epochs --num-epochs",
        "--max_steps": "--steps --iters",
        "--image_size": "--resolution --img_size --size",
        "--unet_dim": "--dim --num_channels --ch",
        "--time_steps": "--timesteps --num_timesteps --diffusion_steps",
        "--beta_schedule": "--noise_schedule",
        "--prediction": "--objective",
        "--ema_decay": "--ema",
        "--num_workers": "--workers --dataloader_num_workers",
        "--data_path": "--data --dataset_path --root --train_data_dir",
        "--output_path": "--output --out --results-dir",
        "--checkpoint_path": "--ckpt",
        "--save_every": "--save_interval",
        "--precision": "--fp16 --amp",
        "--class_conditional": "--class_cond",
        "--init_from": "--pretrained --transfer",
        "--run": "--name --exp-name",
        "--log_path": "--logdir",
        "--warmup_steps": "--lr_warmup_steps",
        # no flag comes near
        "": "--cfg_scale --colour -7 64 --weight_decay --optimizer --test --num_heads --beta1 --gns --eval --config-path",
    },
    "sample.py": {
        "--output_dir": "--output --out --output_path",
        "--checkpoint": "--resume --ckpt --checkpoint_path",
        "--num_samples": "--n_samples --num_sample",
        "--guidance": "--cfg --cfg_scale",
        "--sampler": "--solver --use-ddim",
        "--steps": "--ddim_steps --num_inference_steps --num-sampling-steps",
        "": "--lr --ema --image_size --clip_denoised --temperature --fps",
    },
    "evaluate.py": {"--device": "--gpu", "--num_samples": "--n_samples", "--output_dir": "--out"},
}


@pytest.mark.parametrize(
    "script, word, hint",
    [(script, word, hint) for script in HINTS for hint, words in HINTS[script].items() for word in words.split()],
)
def test_a_word_that_is_no_flag_is_answered_with_the_flag_that_was_meant(script, word, hint):
    name, end = word.partition("=")[0], f"; did you mean {hint}?" if hint else "."
    found = f"{name}: no such flag{end}" if word.startswith("-") else f"{name!r}: a word that belongs to no flag{end}"
    assert refusal(PARSERS[script], word, "5") == f"{found} 'python {script} --help' lists them."
    assert refusal(PARSERS[script], "--seed", "1", word).startswith(found)


@pytest.mark.parametrize("word", ["--resume", "--resume_from=x", "--continue", "--auto-resume", "restart"])
def test_a_run_goes_on_without_a_flag(word):
    said = refusal(PARSERS["train.py"], word, "yes")
    assert said.endswith(f"a run goes on by itself. Type the command that started it, without {word.partition('=')[0]}.")
    assert "goes on by itself" not in refusal(PARSERS["sample.py"], word)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
@pytest.mark.parametrize("word, number", [("cuda:1", "1"), ("1", "1"), ("cuda:0,2", "0,2"), ("GPU3", "3"), ("cuda1", "1")])
def test_which_gpu_is_chosen_by_the_environment(script, word, number):
    way = f"to choose a GPU, type CUDA_VISIBLE_DEVICES={number} before python, and --device cuda."
    assert refusal(PARSERS[script], "--device", word) == f"--device: got {word!r}; {way}"
    assert PARSERS[script].parse(["--device", "cuda"]).device == "cuda"


def test_h_is_help_and_only_that(capsys):
    for word in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            PARSERS["train.py"].parse([word])
        assert ended.value.code == 0 and "--horizontal_flip [BOOL]" in capsys.readouterr().out
    assert "did you mean --horizontal_flip?" in refusal(PARSERS["train.py"], "-horizontal_flip")
    assert refusal(PARSERS["train.py"], "a\nb", "").startswith("'a\\nb': a word that belongs to no flag.")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_two_examples_that_work_and_names_a_run_first(script):
    examples = re.findall(r"(?m)^  python (\S+) (.*)$", PARSERS[script].description)
    assert len(examples) == 2
    for name, words in examples:
        assert name == script and SCRIPTS[script](words.split())
    assert re.findall(r"(?m)^  (--\w+)", PARSERS[script].format_help())[: 2 if script == "train.py" else 1][-1] == "--run"


def test_each_word_of_other_repositories_leads_to_a_flag_that_there_is():
    flags = {flag for parser in PARSERS.values() for flag in parser._option_string_actions}
    assert {f"--{ours}" for ours in ELSEWHERE} <= flags


def test_flags_of_the_environment_come_first_and_an_open_quote_there_is_one_sentence(monkeypatch):
    monkeypatch.setenv("DDPM_FLAGS", "--run 'my run'")
    assert command_line(["--seed", 1], "DDPM_FLAGS") == ["--run", "my run", "--seed", "1"]
    monkeypatch.setenv("DDPM_FLAGS", "--run 'my run")
    with pytest.raises(FlagError, match=r"environment has DDPM_FLAGS=.*: No closing quotation\. Correct or unset it\.$"):
        command_line([], "DDPM_FLAGS")
