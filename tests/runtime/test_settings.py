"""What a run may be told: flags over preset over config.py, and one clear sentence for everything else."""

import contextlib
import importlib
import itertools
import lzma
import os
import re
import shlex
from dataclasses import MISSING, FrozenInstanceError, asdict, fields, replace
from pathlib import Path
from types import ModuleType

import pytest

import config
from src.runtime.settings import (
    KINDS,
    Settings,
    as_flags,
    changed_from_defaults,
    check_combinations,
    checked,
    differences,
    read_comments,
    resolve,
    settings_from_dict,
)  # fmt: skip
from src.utils import FlagError, UserError

ROOT = Path(config.__file__).parent
DEFAULTS = resolve(config, []).settings
COUNT = "expected a whole number from 1 to 1000000."


def config_with(**changes) -> ModuleType:
    """config.py with some of its constants changed."""
    module = ModuleType("config")
    constants = {name: value for name, value in vars(config).items() if name.isupper()}
    vars(module).update(constants | changes)
    return module


def refusal(error: type[UserError], settings_from: ModuleType, *argv: str, **options) -> str:
    """The sentence with which these flags are refused. It is one line, and the exit code is that of `error`."""
    with pytest.raises(UserError) as caught:
        resolve(settings_from, argv, **options)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    return str(caught.value)


# --- where a value comes from -----------------------------------------------------------------------------


def test_config_py_is_accepted_as_it_is():
    for name in KINDS:
        value = getattr(config, name)
        assert getattr(DEFAULTS, name) == (str(value).lower() if name == "COMPILE" else value)
    assert changed_from_defaults(DEFAULTS, config) == []


@pytest.mark.parametrize("preset", config.PRESETS)
def test_every_preset_is_accepted(preset):
    run = resolve(config, ["--preset", preset])
    assert run.preset == preset
    assert {name: getattr(run.settings, name) for name in config.PRESETS[preset]} == config.PRESETS[preset]


def test_a_flag_beats_a_preset_and_a_preset_beats_the_constant():
    module = config_with(BATCH_SIZE=1, EPOCHS=1, SEED=1, PRESETS={"mine": dict(BATCH_SIZE=2, EPOCHS=2)})
    run = resolve(module, ["--batch_size", "3", "--preset", "mine"])
    assert (run.settings.BATCH_SIZE, run.settings.EPOCHS, run.settings.SEED) == (3, 2, 1)
    assert run.typed == {"preset", "batch_size"}
    assert changed_from_defaults(run.settings, module) == [("BATCH_SIZE", 1, 3), ("EPOCHS", 1, 2)]


def test_a_dataset_brings_its_source_which_presets_and_flags_beat():
    sources = {"folder": dict(DATA_PATH="a", DATA_URL="http://b", DATA_SIZE=1), "shapes": {}}
    module = config_with(DATASET="folder", DATA_PATH="c", SOURCES=sources, PRESETS={"mine": dict(DATA_URL="http://d")})
    run = resolve(module, ["--preset", "mine", "--data_size", "2"])
    assert (run.settings.DATA_PATH, run.settings.DATA_URL, run.settings.DATA_SIZE) == ("a", "http://d", 2)
    assert [name for name, _, _ in changed_from_defaults(run.settings, module)] == ["DATA_URL", "DATA_SIZE"]
    for dataset, path in {"shapes": "c", "mine": "./data/mine"}.items():  # one without a row has a folder of its own
        other = resolve(module, ["--dataset", dataset]).settings
        assert other == replace(resolve(config_with(DATA_PATH=path), []).settings, DATASET=dataset)
        assert [name for name, _, _ in changed_from_defaults(other, module)] == ["DATASET"]
    assert resolve(config_with(DATASET="mine", DATA_PATH="c"), []).settings.DATA_PATH == "c"
    assert resolve(config, ["--dataset", "folder"]).settings.DATA_PATH == "./data/folder"  # not Tiny ImageNet's


@pytest.mark.parametrize(
    "words, limit",
    [
        ("", (70, "EPOCHS 7")), ("--epochs 3", (30, "EPOCHS 3")), ("--preset short", (20, "EPOCHS 2")),
        ("--max_steps 5", (5, "--max_steps 5")), ("--max_steps 100", (100, "--max_steps 100")),  # also past EPOCHS
        ("--max_steps 100 --preset short", (100, "--max_steps 100")), ("--max_steps 100 --epochs 3", (30, "EPOCHS 3")),
        ("--max_steps 20 --epochs 3", (20, "--max_steps 20")),
    ],
)  # fmt: skip
def test_max_steps_that_are_typed_beat_epochs_that_are_not(words, limit):
    run = resolve(config_with(EPOCHS=7, PRESETS={"short": dict(EPOCHS=2)}), words.split())
    assert run.limit(steps_per_epoch=10) == limit


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--batch_size 8 --batch_size=64", "BATCH_SIZE", 64), ("--num_workers -1", "NUM_WORKERS", -1),  # the last counts
        ("--learning_rate 1", "LEARNING_RATE", 1.0), ("--precision BF16", "PRECISION", "bf16"),
        ("--compile", "COMPILE", "true"), ("--horizontal_flip NO", "HORIZONTAL_FLIP", False),
        ("--horizontal_flip --seed 1", "HORIZONTAL_FLIP", True), ("--class_conditional=1", "CLASS_CONDITIONAL", True),
        ("--dim_mults '1, 2, 2'", "DIM_MULTS", (1, 2, 2)), ("--dim_mults 3", "DIM_MULTS", (3,)),
        ("--attention_resolutions 0", "ATTENTION_RESOLUTIONS", ()), ("--attention_resolutions=", "ATTENTION_RESOLUTIONS", ()),
        ("--data_md5 ''", "DATA_MD5", ""), ("--output_path 'my pictures'", "OUTPUT_PATH", "my pictures"),
    ],
)  # fmt: skip
def test_a_flag_is_read_as_the_type_of_its_constant(words, name, value):
    read = getattr(resolve(config, shlex.split(words)).settings, name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "name, written, value",
    [
        ("LEARNING_RATE", 1, 1.0), ("COMPILE", True, "true"), ("DIM_MULTS", [1, 2], (1, 2)), ("DIM_MULTS", (1), (1,)),
        ("ATTENTION_RESOLUTIONS", 0, ()), ("DATA_PATH", Path("pictures"), "pictures"),  # plain, as a checkpoint carries it
        ("DATA_PATH", "~/$PLACE", os.path.expanduser("~/here")),
    ],
)  # fmt: skip
def test_a_constant_may_be_written_in_the_ways_that_python_suggests(monkeypatch, name, written, value):
    monkeypatch.setenv("PLACE", "here")
    read = getattr(resolve(config_with(**{name: written}), []).settings, name)
    assert read == value and type(read) is type(value)


# --- flags that cannot be: exit code 2 --------------------------------------------------------------------

MULTS = "expected 1 to 6 whole numbers from 1 to 64, separated by commas."
ADDRESS = "expected an address that begins with http:// or https://."


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--horizontal_flip=maybe", "--horizontal_flip: got 'maybe', expected true or false."),
        ("--learning_rate -1e-4", "--learning_rate: got '-1e-4', expected a number above 0 and at most 10."),
        ("--device 'a\"b, (c'", "--device: got 'a\"b, (c', expected auto, cuda, mps or cpu."),
        ("--dim_mults 1,1,1,1,1,1,1", f"--dim_mults: got '1,1,1,1,1,1,1', {MULTS}"),
        ("--attention_resolutions 16,0", "--attention_resolutions: got '16,0', expected 0 for none, or up to 16 whole "
                                         "numbers from 1 to 1024, separated by commas."),
        ("--data_url tiny.zip", f"--data_url: got 'tiny.zip', {ADDRESS}"),
        ("--data_md5 90d", "--data_md5: got '90d', expected 32 hexadecimal digits in lower case, or ''."),
        ("--device", "--device: no value given, expected auto, cuda, mps or cpu."),
        ("--preset demo", "--preset: got 'demo', expected small or Large."),
        ("--dataset cifar", "--dataset cifar: allowed are shapes, folder."),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_flag_and_what_is_allowed(words, sentence):
    module = config_with(DATASET="shapes", PRESETS={"small": {}, "Large": {}})
    assert refusal(FlagError, module, *shlex.split(words), dataset_names=["shapes", "folder"]) == sentence


# --- a config.py that cannot be: exit code 1 --------------------------------------------------------------

OWN = "Write names of your own in lower case."


@pytest.mark.parametrize(
    "module, sentence",
    [
        (config_with(BATCH_SIZE=True), f"config.py: BATCH_SIZE = True, {COUNT}"),
        (config_with(DROPOUT=float("nan")), "config.py: DROPOUT = nan, expected a number of at least 0 and below 1."),
        (config_with(HORIZONTAL_FLIP=2), "config.py: HORIZONTAL_FLIP = 2, expected true or false."),
        (config_with(DEVICE="gpu"), "config.py: DEVICE = 'gpu', expected auto, cuda, mps or cpu."),
        (config_with(LOG_PATH=5), "config.py: LOG_PATH = 5, expected a path."),
        (config_with(LOG_PATH="$NOPE"), "config.py: LOG_PATH: got '$NOPE', but $NOPE is not set."),
        (config_with(MY_OWN=16), f"config.py: MY_OWN: no such setting. {OWN}"),
        (config_with(PRESETS={"demo": dict(BATCH_SIZ=1)}),
         f"config.py: PRESETS['demo'] sets BATCH_SIZ: no such setting; did you mean BATCH_SIZE? {OWN}"),
        (config_with(PRESETS={"demo": dict(BATCH_SIZE="many")}),
         f"config.py: PRESETS['demo'] sets BATCH_SIZE = 'many', {COUNT}"),
        (config_with(PRESETS={"demo": 3}),
         "config.py: PRESETS is not a dict of dicts; expected {'name': dict(BATCH_SIZE=64), ...}."),
        (config_with(SOURCES=[]), "config.py: SOURCES is not a dict of dicts; expected {'name': dict(BATCH_SIZE=64), ...}."),
        (config_with(DATASET="shapes", SOURCES={"shapes": dict(DATA_SIZE="?")}),
         "config.py: SOURCES['shapes'] sets DATA_SIZE = '?', expected a whole number from 0 to 1000000000000000."),
        (config_with(DATASET="cifar"), "config.py: DATASET = 'cifar': allowed are tiny-imagenet, shapes."),
        (config_with(IMAGE_SIZE=50, DIM_MULTS=(1, 2, 3)),
         "config.py: IMAGE_SIZE = 50 with config.py: DIM_MULTS = (1, 2, 3): allowed are multiples of 4 from 8 on, for "
         "example 48 or 52, or as it is with --dim_mults 1,2."),
    ],
)  # fmt: skip
def test_a_fault_in_config_py_is_named_as_such(module, sentence):
    assert refusal(UserError, module, dataset_names=["tiny-imagenet", "shapes"]) == sentence


def test_names_in_lower_case_and_with_an_underscore_are_the_users_own():
    resolve(config_with(helper=3, _HELPER=4, Path=Path), [])


# --- combinations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--unet_dim 100", "--unet_dim 100: allowed are multiples of 8 below 128 and of 32 from there on, for example 96 "
                           "or 104."),
        ("--image_size 8 --dim_mults 1,2,3,4",
         "--image_size 8 with --dim_mults 1,2,3,4: allowed are multiples of 8 from 16 on, for example 16 or 24, or as it "
         "is with --dim_mults 1,2,3."),
        ("--image_size 28", "--image_size 28 with config.py: DIM_MULTS = (1, 2, 3, 4): allowed are multiples of 8 from 16 on, "
                            "for example 24 or 32, or as it is with --dim_mults 1,2,3."),
        ("--preset small --dim_mults 1,1,1,1,1",
         "config.py: PRESETS['small'] sets IMAGE_SIZE = 8 with --dim_mults 1,1,1,1,1: allowed are multiples of 16 from 32 "
         "on, for example 32 or 48, or as it is with --dim_mults 1,1,1."),
        ("--attention_resolutions 16,7 --dim_mults 1,2 --image_size 32",
         "--attention_resolutions 16,7 with --image_size 32 and --dim_mults 1,2: allowed are 0 and the sizes of the "
         "levels, 32,16."),
        ("--precision fp16 --device cpu", "--precision fp16 with --device cpu: allowed are fp32 and bf16 on a CPU."),
    ],
)  # fmt: skip
def test_a_combination_that_cannot_work_is_refused(words, sentence):
    module = config_with(PRESETS={"small": dict(IMAGE_SIZE=8, DIM_MULTS=(1, 2))})
    assert refusal(FlagError, module, *words.split()) == sentence


def test_the_levels_advised_for_an_image_size_are_accepted():
    for size, mults in itertools.product(range(8, 130), ("1", "1,2", "1,2,3,4", "1,1,2,2,4,4")):
        words = ["--image_size", str(size), "--dim_mults", mults]
        with contextlib.suppress(FlagError):
            resolve(config, words)
            continue
        advised = re.search(r"as it is with --dim_mults (\S+)\.$", refusal(FlagError, config, *words))[1]
        assert mults.startswith(advised) and resolve(config, [*words, "--dim_mults", advised])


def test_the_network_of_init_from_beats_a_preset_which_beats_the_constant():
    asked = []

    def network_of(folder: Path, init_from: str) -> dict:
        asked.append((folder, init_from))
        return dict(UNET_DIM=32, DIM_MULTS=(1, 2), IMAGE_SIZE=16, TIME_STEPS=7)

    presets = {"mine": dict(TIME_STEPS=9, BATCH_SIZE=3)}
    module = config_with(PRESETS=presets, SOURCES={"shapes": dict(IMAGE_SIZE=8)}, DATASET="shapes")
    words = ["--init_from", "x.pth", "--preset", "mine", "--unet_dim", "64", "--run", "new"]
    s = resolve(module, words, network_of=network_of).settings
    assert (s.UNET_DIM, s.TIME_STEPS, s.DIM_MULTS, s.IMAGE_SIZE, s.BATCH_SIZE) == (64, 7, (1, 2), 16, 3)
    assert asked == [(Path("checkpoints/new"), "x.pth")]
    sentence = refusal(FlagError, module, *words, "--dim_mults", "1,1,1,1,1,1", network_of=network_of)
    assert sentence.startswith("x.pth has IMAGE_SIZE = 16 with --dim_mults 1,1,1,1,1,1: allowed are multiples of 32")


def test_a_combination_of_a_preset_alone_is_the_presets_fault():
    module = config_with(PRESETS={"mine": dict(UNET_DIM=4 * 33)})
    assert refusal(UserError, module, "--preset", "mine").startswith("config.py: PRESETS['mine'] sets UNET_DIM = 132: ")


@pytest.mark.parametrize("words", ["--image_size 128", "--image_size 16 --dim_mults 1,2,3,4", "--image_size 9 --dim_mults 1"])
def test_a_combination_at_the_edge_is_accepted(words):
    resolve(config, words.split())


def test_the_widths_allowed_are_those_that_the_norms_of_the_network_divide():
    norm_groups = pytest.importorskip("src.model").norm_groups
    for dim in range(8, 1025):
        with contextlib.nullcontext() if dim % norm_groups(dim) == 0 else pytest.raises(FlagError):
            check_combinations(replace(DEFAULTS, UNET_DIM=dim), places={})


# --- --help -----------------------------------------------------------------------------------------------


@pytest.fixture
def help_text(monkeypatch, capsys):
    """What `COLUMNS=100 python train.py --help` prints."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        resolve(config, ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_fits_100_columns_and_is_grouped_as_config_py_is(help_text):
    assert max(map(len, help_text.splitlines())) <= 100
    headings = re.findall(r"^# -+ (.+?) -+$", Path(config.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    tables = ["presets", "datasets with a source of their own"]
    assert re.findall(r"^(\S.*):$", help_text, re.MULTILINE) == ["this run", *headings, "options", *tables]


def test_help_shows_each_constant_with_its_comment_and_default_and_what_a_preset_changes(help_text):
    flags, _, presets = help_text.partition("presets:")
    assert re.findall(r"(?m)^  --(\w+)", flags)[:2] == ["preset", "run"]
    entries = {entry.split()[0]: "".join(entry.split()) for entry in re.split(r"\n\n|\n(?=  --)", flags) if entry}
    comments = read_comments(config)
    for name in KINDS:
        value = as_flags({name: getattr(DEFAULTS, name)}).replace("=", " ").split(" ", 1)[1].replace("''", "none")
        assert comments[name][1] and "".join(f"{comments[name][1]}(default:{value})".split()) in entries[f"--{name.lower()}"]
    for name, changes in [*config.PRESETS.items(), *config.SOURCES.items()]:
        assert not changes or f"{name}: {as_flags(checked(changes, ''))}" in " ".join(presets.split())


def test_a_comment_may_go_on_in_indented_lines_below(monkeypatch):
    lines = ["# Not a heading.", "# --- size ---", "BATCH_SIZE = 16  # images per pass,", "    # over 100% of", "    # all", "",
             "    # not about EPOCHS", "EPOCHS = 3", "# --- place ---", "LOG_PATH = '# no comment'  # a comment"]  # fmt: skip
    monkeypatch.setattr("inspect.getsource", lambda _: "\n".join(lines))
    assert read_comments(config) == {
        "BATCH_SIZE": ("size", "images per pass, over 100% of all"), "EPOCHS": ("size", ""), "LOG_PATH": ("place", "a comment"),
    }  # fmt: skip
    monkeypatch.undo()
    assert read_comments(config_with()) == {}  # made in memory: --help does without


# --- settings as values -----------------------------------------------------------------------------------


def test_settings_are_a_value():
    with pytest.raises(FrozenInstanceError):
        DEFAULTS.BATCH_SIZE = 2
    assert replace(DEFAULTS, BATCH_SIZE=2) != DEFAULTS == Settings(**asdict(DEFAULTS))


def test_settings_written_as_flags_are_read_back_unchanged():
    settings = replace(
        DEFAULTS, OUTPUT_PATH="it's mine/50% \"off\"", LOG_PATH="-odd --name", ATTENTION_RESOLUTIONS=(), DATA_MD5="",
        HORIZONTAL_FLIP=False, COMPILE="false", LEARNING_RATE=1.2345678e-5, DIM_MULTS=(1, 2), NUM_WORKERS=-1,
    )  # fmt: skip
    assert resolve(config, shlex.split(as_flags(asdict(settings)))).settings == settings
    assert as_flags(dict(UNET_DIM=32, DIM_MULTS=(1, 2, 2), HORIZONTAL_FLIP=False)) == (
        "--unet_dim 32 --dim_mults 1,2,2 --horizontal_flip false"
    )


def test_differences_name_each_setting_that_changed_and_those_that_one_side_lacks():
    old = dict(SEED=0, DIM_MULTS=[1, 2], EPOCHS=3, OLD=1)
    assert differences(old, dict(SEED=0, DIM_MULTS=(1, 2), EPOCHS=4, NEW=2)) == [
        ("EPOCHS", 3, 4), ("OLD", 1, None), ("NEW", None, 2),
    ]  # fmt: skip


# --- settings of a checkpoint -----------------------------------------------------------------------------


def test_a_checkpoints_settings_come_back_as_they_were():
    saved = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(DEFAULTS).items()}
    saved |= {"DATA_PATH": "~/a$b", "LOG_PATH": " "}  # what was typed is expanded before it is saved
    restored = settings_from_dict(saved)
    assert restored == replace(DEFAULTS, DATA_PATH="~/a$b", LOG_PATH=" ") and type(restored.DIM_MULTS) is tuple


@pytest.mark.parametrize(
    "saved, sentence",
    [
        (asdict(DEFAULTS) | dict(BATCH_SIZE=None), f"has BATCH_SIZE = None, {COUNT} Use another checkpoint."),
        (asdict(DEFAULTS) | dict(LOG_PATH=None), "has LOG_PATH = None, expected a path. Use another checkpoint."),
    ],
)  # fmt: skip
def test_a_checkpoint_with_settings_of_another_program_is_refused(saved, sentence):
    with pytest.raises(UserError) as caught:
        settings_from_dict(saved)
    assert str(caught.value) == f"The checkpoint {sentence}"


def test_a_setting_without_a_default_is_one_that_every_checkpoint_has():
    torch = pytest.importorskip("torch")
    with lzma.open(ROOT / "tests/golden/version_1.pth.xz") as file:
        oldest = torch.load(file, weights_only=True)["config"]
    assert {setting.name for setting in fields(Settings) if setting.default is MISSING} <= oldest.keys()
    settings_from_dict(oldest)
    for setting in fields(Settings):
        if setting.default is not MISSING:
            assert checked({setting.name: setting.default}, "") == {setting.name: setting.default}


def test_a_new_setting_is_a_line_in_config_py_and_a_line_in_settings_py(tmp_path, monkeypatch):
    """And older checkpoints go on as before it."""
    constant = 'PAPER = "ddpm"  # whose recipe: none, ddpm, iddpm\n'
    setting = '    PAPER: str = field(default="none", metadata=choice("none", "ddpm", "iddpm"))\n'
    for file, before, line in (("config.py", "EPOCHS", constant), ("src/runtime/settings.py", "    EPOCHS", setting)):
        text = re.sub(rf"(?m)^(?={before}\b)", line, (ROOT / file).read_text(encoding="utf-8"), count=1)
        (tmp_path / f"new_{Path(file).name}").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    new_config, new_settings = map(importlib.import_module, ("new_config", "new_settings"))
    assert new_settings.resolve(new_config, []).settings.PAPER == "ddpm"
    assert new_settings.resolve(new_config, ["--paper", "IDDPM"]).settings.PAPER == "iddpm"
    assert new_settings.read_comments(new_config)["PAPER"] == ("training", "whose recipe: none, ddpm, iddpm")
    assert new_settings.settings_from_dict(asdict(DEFAULTS)).PAPER == "none"
