"""What a run may be told: flags over preset over config.py, and one clear sentence for everything else."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import config
from src.runtime.flags import FlagParser, choice, whole
from src.runtime.settings import (
    RULES,
    Settings,
    as_flags,
    changed_from_defaults,
    check_combinations,
    differences,
    read_comments,
    resolve,
    settings_from_dict,
)
from src.utils import FlagError, UserError

DEFAULTS = resolve(config, []).settings


def config_with(without: str = "", **changes) -> ModuleType:
    """config.py with some of its constants changed, and one removed."""
    module = ModuleType("config")
    constants = {name: value for name, value in vars(config).items() if name.isupper() and name != without}
    vars(module).update(constants | changes)
    return module


def refusal(error: type[UserError], settings_from: ModuleType, *argv: str, **options) -> str:
    """The sentence with which these flags are refused. It is one line, and the exit code is that of `error`."""
    with pytest.raises(UserError) as caught:
        resolve(settings_from, argv, **options)
    assert type(caught.value) is error
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# --- what a value comes from ----------------------------------------------------------------------------


def test_config_py_as_it_stands_is_accepted_and_changed_in_nothing():
    for name in RULES:
        value = getattr(config, name)
        assert getattr(DEFAULTS, name) == (str(value).lower() if name == "COMPILE" else value)
    assert changed_from_defaults(DEFAULTS, config) == []


@pytest.mark.parametrize("preset", config.PRESETS)
def test_every_preset_is_accepted(preset):
    run = resolve(config, ["--preset", preset])
    assert run.preset == preset
    for name, value in config.PRESETS[preset].items():
        assert getattr(run.settings, name) == value


def test_a_flag_beats_a_preset_and_a_preset_beats_the_constant():
    module = config_with(BATCH_SIZE=1, EPOCHS=1, SEED=1, PRESETS={"mine": dict(BATCH_SIZE=2, EPOCHS=2)})
    settings = resolve(module, ["--batch_size", "3", "--preset", "mine"]).settings
    assert (settings.BATCH_SIZE, settings.EPOCHS, settings.SEED) == (3, 2, 1)
    assert changed_from_defaults(settings, module) == [("BATCH_SIZE", 1, 3), ("EPOCHS", 1, 2)]


def test_a_run_without_flags_has_no_preset_no_last_step_and_accepts_no_changes():
    assert resolve(config, [])[1:] == (None, None, False)
    assert resolve(config, ["--max_steps", "30", "--accept_changes"])[1:] == (None, 30, True)


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        DEFAULTS.BATCH_SIZE = 2
    assert DEFAULTS._replace(BATCH_SIZE=2).BATCH_SIZE == 2


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--batch_size 64", "BATCH_SIZE", 64),
        ("--batch_size=64", "BATCH_SIZE", 64),
        ("--batch_size 8 --batch_size 64", "BATCH_SIZE", 64),
        ("--num_workers -1", "NUM_WORKERS", -1),
        ("--learning_rate 3e-4", "LEARNING_RATE", 0.0003),
        ("--learning_rate 1", "LEARNING_RATE", 1.0),
        ("--horizontal_flip", "HORIZONTAL_FLIP", True),
        ("--class_conditional --seed 1", "CLASS_CONDITIONAL", True),
        ("--horizontal_flip false", "HORIZONTAL_FLIP", False),
        ("--horizontal_flip NO", "HORIZONTAL_FLIP", False),
        ("--horizontal_flip=0", "HORIZONTAL_FLIP", False),
        ("--class_conditional yes", "CLASS_CONDITIONAL", True),
        ("--class_conditional 1", "CLASS_CONDITIONAL", True),
        ("--compile", "COMPILE", "true"),
        ("--compile false", "COMPILE", "false"),
        ("--precision BF16", "PRECISION", "bf16"),
        ("--dim_mults 1,2,2", "DIM_MULTS", (1, 2, 2)),
        ("--dim_mults '1, 2, 2'", "DIM_MULTS", (1, 2, 2)),
        ("--dim_mults 3", "DIM_MULTS", (3,)),
        ("--attention_resolutions 0", "ATTENTION_RESOLUTIONS", ()),
        ("--attention_resolutions ''", "ATTENTION_RESOLUTIONS", ()),
        ("--attention_resolutions=", "ATTENTION_RESOLUTIONS", ()),
        ("--data_md5 ''", "DATA_MD5", ""),
        ("--output_path 'my pictures'", "OUTPUT_PATH", "my pictures"),
    ],
)
def test_a_flag_is_read_as_the_type_of_its_constant(words, name, value):
    read = getattr(resolve(config, shlex.split(words)).settings, name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "name, written, value",
    [
        ("LEARNING_RATE", 1, 1.0),
        ("COMPILE", True, "true"),
        ("COMPILE", False, "false"),
        ("DIM_MULTS", [1, 2], (1, 2)),
        ("DIM_MULTS", (1), (1,)),  # the comma forgotten
        ("ATTENTION_RESOLUTIONS", 0, ()),
        ("ATTENTION_RESOLUTIONS", (), ()),
        ("DATA_PATH", Path("pictures"), "pictures"),  # plain, as a checkpoint carries it
    ],
)
def test_a_constant_may_be_written_in_the_ways_that_python_suggests(name, written, value):
    read = getattr(resolve(config_with(**{name: written}), []).settings, name)
    assert read == value and type(read) is type(value)


# --- flags that cannot be: exit code 2 ------------------------------------------------------------------


MULTS = "1 to 6 whole numbers of at least 1, separated by commas."


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--batch_size many", "--batch_size: got 'many', expected a whole number of at least 1."),
        ("--batch_size=many", "--batch_size: got 'many', expected a whole number of at least 1."),
        ("--batch_size 1.5", "--batch_size: got '1.5', expected a whole number of at least 1."),
        ("--batch_size 0", "--batch_size: got '0', expected a whole number of at least 1."),
        ("--batch_size -4", "--batch_size: got '-4', expected a whole number of at least 1."),
        ("--batch_size ''", "--batch_size: got '', expected a whole number of at least 1."),
        ("--max_steps 0", "--max_steps: got '0', expected a whole number of at least 1."),
        ("--time_steps 1", "--time_steps: got '1', expected a whole number of at least 2."),
        ("--num_workers -2", "--num_workers: got '-2', expected a whole number of at least -1."),
        ("--image_size 4", "--image_size: got '4', expected a whole number from 8 to 1024."),
        ("--image_size 2048", "--image_size: got '2048', expected a whole number from 8 to 1024."),
        ("--learning_rate 0", "--learning_rate: got '0', expected a number above 0."),
        ("--learning_rate -1e-4", "--learning_rate: got '-1e-4', expected a number above 0."),
        ("--learning_rate nan", "--learning_rate: got 'nan', expected a number above 0."),
        ("--grad_clip inf", "--grad_clip: got 'inf', expected a number of at least 0."),
        ("--grad_clip -inf", "--grad_clip: got '-inf', expected a number of at least 0."),
        ("--min_snr_gamma -1", "--min_snr_gamma: got '-1', expected a number of at least 0."),
        ("--dropout 1", "--dropout: got '1', expected a number of at least 0 and below 1."),
        ("--dropout -.1", "--dropout: got '-.1', expected a number of at least 0 and below 1."),
        ("--ema_decay 1.0", "--ema_decay: got '1.0', expected a number of at least 0 and below 1."),
        ("--label_dropout 1", "--label_dropout: got '1', expected a number of at least 0 and below 1."),
        ("--horizontal_flip maybe", "--horizontal_flip: got 'maybe', expected true or false."),
        ("--precision fp64", "--precision: got 'fp64', expected auto, fp32, bf16 or fp16."),
        ("--compile 5", "--compile: got '5', expected auto, true or false."),
        ("--device gpu", "--device: got 'gpu', expected auto, cuda, mps or cpu."),
        ("--prediction noise", "--prediction: got 'noise', expected eps, v or x0."),
        ("--beta_schedule sine", "--beta_schedule: got 'sine', expected linear or cosine."),
        ("--dim_mults 1x2", f"--dim_mults: got '1x2', expected {MULTS}"),
        ("--dim_mults 1,-2", f"--dim_mults: got '1,-2', expected {MULTS}"),
        ("--dim_mults 0", f"--dim_mults: got '0', expected {MULTS}"),
        ("--dim_mults 1,1,1,1,1,1,1", f"--dim_mults: got '1,1,1,1,1,1,1', expected {MULTS}"),
        ("--attention_resolutions 16,0", "--attention_resolutions: got '16,0', expected 0 for none, or whole numbers "
                                         "of at least 1, separated by commas."),
        ("--checkpoint_path ''", "--checkpoint_path: got '', expected the path of a folder."),
        ("--log_path ' '", "--log_path: got ' ', expected the path of a folder."),
        ("--data_url tiny.zip", "--data_url: got 'tiny.zip', expected an address that begins with http:// or https://."),
        ("--data_md5 90d", "--data_md5: got '90d', expected 32 hexadecimal digits in lower case, or ''."),
        ("--seed", "--seed: no value given, expected a whole number from 0 to 4294967295."),
        ("--seed --epochs 3", "--seed: no value given, expected a whole number from 0 to 4294967295."),
        ("--accept_changes=perhaps", "--accept_changes: got 'perhaps', expected true or false."),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_flag_and_what_is_allowed(words, sentence):
    assert refusal(FlagError, config, *shlex.split(words)) == sentence


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--batchsize 64", "--batchsize: no such flag; did you mean --batch_size?"),
        ("--batchsize=64", "--batchsize: no such flag; did you mean --batch_size?"),
        ("--batch-size 64", "--batch-size: no such flag; did you mean --batch_size?"),
        ("--BATCH_SIZE 64", "--BATCH_SIZE: no such flag; did you mean --batch_size?"),
        ("-batch_size 64", "-batch_size: no such flag; did you mean --batch_size?"),
        ("--batch 64", "--batch: no such flag; did you mean --batch_size?"),  # no abbreviations
        ("--colour red", "--colour: no such flag."),
        ("-7", "-7: no such flag."),
        ("64", "64: a word that belongs to no flag."),
        ("--seed 1 2", "2: a word that belongs to no flag."),
        ("batch_size=64", "batch_size: a word that belongs to no flag; did you mean --batch_size?"),
    ],
)
def test_a_word_that_is_no_flag_is_answered_with_the_nearest(words, sentence):
    assert refusal(FlagError, config, *words.split()) == f"{sentence} 'python train.py --help' lists them."


def test_an_unknown_preset_is_answered_with_the_list():
    module = config_with(PRESETS={"small": {}, "Large": {}})
    assert refusal(FlagError, module, "--preset", "demo") == "--preset: got 'demo', expected small or Large."
    assert resolve(module, ["--preset", "Large"]).preset == "Large"


def test_datasets_are_those_of_the_table_that_is_handed_in():
    sentence = "--dataset: got 'cifar'; allowed are shapes, folder."
    assert refusal(FlagError, config, "--dataset", "cifar", dataset_names=["shapes", "folder"]) == sentence
    assert resolve(config, ["--dataset", "folder"], ["shapes", "folder"]).settings.DATASET == "folder"
    assert resolve(config, ["--dataset", "cifar"]).settings.DATASET == "cifar"


# --- a config.py that cannot be: exit code 1 ------------------------------------------------------------


@pytest.mark.parametrize(
    "module, sentence",
    [
        (config_with(BATCH_SIZE="many"), "config.py: BATCH_SIZE = 'many', expected a whole number of at least 1."),
        (config_with(BATCH_SIZE=1.5), "config.py: BATCH_SIZE = 1.5, expected a whole number of at least 1."),
        (config_with(BATCH_SIZE=True), "config.py: BATCH_SIZE = True, expected a whole number of at least 1."),
        (config_with(BATCH_SIZE=None), "config.py: BATCH_SIZE = None, expected a whole number of at least 1."),
        (config_with(DROPOUT=float("nan")), "config.py: DROPOUT = nan, expected a number of at least 0 and below 1."),
        (config_with(HORIZONTAL_FLIP=2), "config.py: HORIZONTAL_FLIP = 2, expected true or false."),
        (config_with(LOG_PATH=5), "config.py: LOG_PATH = 5, expected the path of a folder."),
        (config_with(without="BATCH_SIZE"),
         "config.py has no BATCH_SIZE; set BATCH_SIZE to a whole number of at least 1."),
        (config_with(without="PRESETS"), "config.py has no PRESETS; set PRESETS to a dict, which may be empty."),
        (config_with(without="BATCH_SIZE", BATCH_SZIE=16),
         "config.py has BATCH_SZIE where it needs BATCH_SIZE; rename it."),
        (config_with(BATCH_SIZ=16), "config.py: BATCH_SIZ is not a constant of a run; did you mean BATCH_SIZE? "
                                    "Remove it, or write a name of your own in lower case."),
        (config_with(MY_OWN=16), "config.py: MY_OWN is not a constant of a run. "
                                 "Remove it, or write a name of your own in lower case."),
        (config_with(PRESETS={"demo": dict(BATCH_SIZ=1)}),
         "config.py: PRESETS['demo'] sets BATCH_SIZ, which is not a constant; did you mean BATCH_SIZE?"),
        (config_with(PRESETS={"demo": dict(BATCH_SIZE="many")}),
         "config.py: PRESETS['demo'] sets BATCH_SIZE = 'many', expected a whole number of at least 1."),
        (config_with(PRESETS={"demo": 3}),
         "config.py: PRESETS is not a dict of dicts; expected {'name': dict(BATCH_SIZE=64), ...}."),
        (config_with(UNET_DIM=100), "config.py: UNET_DIM = 100; allowed are multiples of 8 below 128 and of 32 from "
                                    "there on, for example 96 or 104."),
        (config_with(IMAGE_SIZE=50, DIM_MULTS=(1, 2, 3)),
         "config.py: IMAGE_SIZE = 50 with DIM_MULTS = (1, 2, 3); the network shrinks images 4-fold, so allowed sizes "
         "are multiples of 4 from 8 on, for example 48 or 52."),
    ],
)  # fmt: skip
def test_a_fault_in_config_py_is_named_as_such(module, sentence):
    assert refusal(UserError, module) == sentence


def test_names_in_lower_case_and_with_an_underscore_are_left_to_the_user():
    resolve(config_with(helper=3, _HELPER=4, Path=Path), [])


# --- combinations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--unet_dim 100", "--unet_dim: got 100; allowed are multiples of 8 below 128 and of 32 from there on, "
                           "for example 96 or 104."),
        ("--unet_dim 136", "--unet_dim: got 136; allowed are multiples of 8 below 128 and of 32 from there on, "
                           "for example 128 or 160."),
        ("--image_size 50 --dim_mults 1,2,3,4",
         "--image_size: got 50 with --dim_mults 1,2,3,4; the network shrinks images 8-fold, so allowed sizes are "
         "multiples of 8 from 16 on, for example 48 or 56."),
        ("--image_size 8 --dim_mults 1,2,3,4",
         "--image_size: got 8 with --dim_mults 1,2,3,4; the network shrinks images 8-fold, so allowed sizes are "
         "multiples of 8 from 16 on, for example 16."),
        ("--preset small --dim_mults 1,1,1,1,1",  # blames what was typed
         "--dim_mults: got 1,1,1,1,1 with --image_size 8; the network shrinks images 16-fold, so allowed sizes are "
         "multiples of 16 from 32 on, for example 32."),
        ("--attention_resolutions 16,7 --dim_mults 1,2 --image_size 32",
         "--attention_resolutions: got 16,7 with --image_size 32 and --dim_mults 1,2; allowed are 0 and the levels' "
         "sizes 32,16."),
        ("--precision fp16 --device cpu",
         "--precision: got 'fp16' with --device cpu; allowed on a CPU are fp32 and bf16."),
    ],
)  # fmt: skip
def test_a_combination_that_cannot_work_is_refused(words, sentence):
    module = config_with(PRESETS={"small": dict(IMAGE_SIZE=8, DIM_MULTS=(1, 2))})
    assert refusal(FlagError, module, *words.split()) == sentence


def test_a_combination_of_a_preset_alone_is_the_presets_fault():
    module = config_with(PRESETS={"mine": dict(UNET_DIM=4 * 33)})
    assert refusal(UserError, module, "--preset", "mine").startswith("config.py: PRESETS['mine'] sets UNET_DIM = 132; ")


def test_the_default_attention_may_name_sizes_that_another_image_size_does_not_have():
    assert resolve(config, ["--image_size", "128"]).settings.ATTENTION_RESOLUTIONS == config.ATTENTION_RESOLUTIONS


@pytest.mark.parametrize(
    "words",
    [
        "--preview_steps 20 --time_steps 20",
        "--precision fp16",
        "--precision bf16 --device cpu",
        "--image_size 16 --dim_mults 1,2,3,4",
        "--image_size 9 --dim_mults 1",
    ],
)
def test_a_combination_at_the_edge_is_accepted(words):
    resolve(config, words.split())


def test_the_widths_allowed_are_those_that_the_norms_of_the_network_divide():
    norm_groups = pytest.importorskip("src.model").norm_groups
    for dim in range(8, 1025):
        try:
            check_combinations(DEFAULTS._replace(UNET_DIM=dim))
            is_allowed = True
        except FlagError:
            is_allowed = False
        assert is_allowed == (dim % norm_groups(dim) == 0), dim


# --- --help ---------------------------------------------------------------------------------------------


@pytest.fixture
def help_text(monkeypatch, capsys):
    """What `COLUMNS=100 python train.py --help` prints."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        resolve(config, ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [0, 1])
def test_a_terminal_that_says_no_width_is_no_hindrance(monkeypatch, columns):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((columns, 0)))  # what Python 3.10 may get
    assert resolve(config, ["--preset", "demo"]).preset == "demo"


def test_help_fits_100_columns_in_two_lines_a_flag(help_text):
    assert max(map(len, help_text.splitlines())) <= 100
    for entry in re.findall(r"^  --.*\n(?:   .*\n)*", help_text, re.MULTILINE):
        assert entry.count("\n") <= 2, entry


def test_help_shows_each_constant_with_its_comment_and_default(help_text):
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in re.split(r"\n\n|\n(?=  --)", help_text) if entry}
    comments = read_comments(config)
    for name in RULES:
        entry = entries[f"--{name.lower()}"]
        assert comments[name][1] and comments[name][1] in entry
        value = as_flags({name: getattr(DEFAULTS, name)}).replace("=", " ").split(" ", 1)[1]
        assert entry.endswith(f"(default: {value})")
    assert "--preset" in entries and "--max_steps" in entries and "--accept_changes" in entries


def test_help_is_grouped_as_config_py_is(help_text):
    headings = re.findall(r"^# -+ (.+?) -+$", Path(config.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"^(\S.*):$", help_text, re.MULTILINE) == ["options", "this run", *headings, "presets"]


def test_help_lists_what_each_preset_changes(help_text):
    words = " ".join(help_text.split("presets:")[1].split())
    for preset, changes in config.PRESETS.items():
        assert f"{preset}: {as_flags(changes)}" in words


def test_a_comment_may_go_on_in_indented_lines_below(tmp_path, monkeypatch):
    (tmp_path / "wrapped.py").write_text(
        "# Not a heading.\n"
        "# --- size ---\n"
        "BATCH_SIZE = 16  # images per pass,\n"
        "    # over 100% of\n"
        "    # the processes\n"
        "\n"
        "    # not about EPOCHS\n"
        "EPOCHS = 3\n"
        "# nor is this\n"
        "# --- place ---\n"
        "DIM_MULTS = (\n"
        "    1,  # first\n"
        "    2,  # then\n"
        ")\n"
        "LOG_PATH = '# no comment'  # a comment\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import wrapped

    assert read_comments(wrapped) == {
        "BATCH_SIZE": ("size", "images per pass, over 100% of the processes"),
        "DIM_MULTS": ("place", "first then"),
        "LOG_PATH": ("place", "a comment"),
    }


def test_help_does_without_the_source_of_config_py(capsys):
    with pytest.raises(SystemExit):
        resolve(config_with(), ["--help"])
    assert "--batch_size" in capsys.readouterr().out


def test_settings_need_no_torch():
    code = "import sys, src.runtime.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(config.__file__).parent).returncode == 0


# --- settings as values ---------------------------------------------------------------------------------


def test_settings_written_as_flags_are_read_back_unchanged():
    settings = DEFAULTS._replace(
        OUTPUT_PATH="it's mine/50% \"off\"", LOG_PATH="-odd --name", ATTENTION_RESOLUTIONS=(), DATA_MD5="",
        HORIZONTAL_FLIP=False, COMPILE="false", LEARNING_RATE=1.2345678e-5, DIM_MULTS=(1, 2), NUM_WORKERS=-1,
    )  # fmt: skip
    assert resolve(config, shlex.split(as_flags(settings._asdict()))).settings == settings
    assert as_flags(dict(UNET_DIM=32, DIM_MULTS=(1, 2, 2), HORIZONTAL_FLIP=False)) == (
        "--unet_dim 32 --dim_mults 1,2,2 --horizontal_flip false"
    )


def test_differences_name_each_setting_that_changed_and_those_that_one_side_lacks():
    old = dict(SEED=0, DIM_MULTS=[1, 2], EPOCHS=3, OLD=1)
    assert differences(old, dict(SEED=0, DIM_MULTS=(1, 2), EPOCHS=4, NEW=2)) == [
        ("EPOCHS", 3, 4), ("OLD", 1, None), ("NEW", None, 2),
    ]  # fmt: skip


def test_a_checkpoints_settings_come_back_as_they_were():
    saved = {name: list(value) if isinstance(value, tuple) else value for name, value in DEFAULTS._asdict().items()}
    restored = settings_from_dict(saved)
    assert restored == DEFAULTS and isinstance(restored, Settings) and type(restored.DIM_MULTS) is tuple


@pytest.mark.parametrize(
    "changes, problem",
    [
        (dict(BATCH_SIZE=None), "has BATCH_SIZE = None, expected a whole number of at least 1"),
        (dict(FUTURE=1), "has an unknown setting FUTURE"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(changes, problem):
    advice = "another version of this program wrote it. Use that version, or train again."
    with pytest.raises(UserError) as caught:
        settings_from_dict(DEFAULTS._asdict() | changes)
    assert str(caught.value) == f"The checkpoint {problem}: {advice}"
    with pytest.raises(UserError) as caught:
        settings_from_dict({name: value for name, value in DEFAULTS._asdict().items() if name != "SEED"})
    assert str(caught.value) == f"The checkpoint has no setting SEED: {advice}"


# --- the same flags for other scripts -------------------------------------------------------------------


def test_another_script_has_flags_of_the_same_manner():
    parser = FlagParser("sample.py", description="Draw pictures.")
    parser.add("--steps", whole(1), "steps of the sampler", default=None)
    parser.add("--sampler", choice("ddpm", "ddim", "dpm++"), "how to draw", default="ddpm")
    assert parser.parse(["--sampler", "dpm++"]) == {"steps": None, "sampler": "dpm++"}
    for words, sentence in {
        "--steps 0": "--steps: got '0', expected a whole number of at least 1.",
        "--step 5": "--step: no such flag; did you mean --steps? 'python sample.py --help' lists them.",
    }.items():
        with pytest.raises(FlagError) as caught:
            parser.parse(words.split())
        assert str(caught.value) == sentence


def test_a_comment_is_printed_as_it_is_written(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    parser = FlagParser("sample.py")
    parser.add("--keep", whole(1), "100% of tiny-imagenet, of tiny-imagenet, of tiny-imagenet")
    printed = parser.format_help()
    assert "100%" in printed and printed.count("tiny-imagenet") == 3  # no word broken at its hyphen
