"""The settings of a run: config.py, then a preset, then the flags -> one immutable `Settings`. Imports no torch.

config.py holds the values, and the comments that `--help` prints. A refusal is one sentence that names the place, what was
found and what is allowed: a FlagError for what was typed, a UserError for config.py and checkpoints.
"""

import argparse
import inspect
import re
import shlex
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from src.runtime.flags import CLASSES, PATH, RUN, TRUTH, FlagParser, choice, did_you_mean, number, text, whole, wholes
from src.utils import FlagError, UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A field for each constant of config.py, with its kind of value. A new one needs a default, for checkpoints that are older
    than it: the value with which the program does what it did before."""

    DATASET: str = field(metadata=text("the name of a dataset", r".*\S.*", "NAME"))  # src/dataset.py knows which there are
    CLASSES: str = field(default="", metadata=CLASSES)
    DATA_PATH: str = field(metadata=PATH)
    DATA_URL: str = field(metadata=text("an address that begins with http:// or https://", r"https?://\S+", "URL"))
    DATA_SIZE: int = field(metadata=whole(0, 10**15))
    DATA_MD5: str = field(metadata=text("32 hexadecimal digits in lower case, or ''", r"([0-9a-f]{32})?", "MD5"))
    CACHE_PATH: str = field(metadata=PATH)
    IMAGE_SIZE: int = field(metadata=whole(8, 1024))
    CHANNELS: int = field(default=3, metadata=choice(1, 3, type=lambda x: int(str(x)), metavar="N"))
    NUM_WORKERS: int = field(metadata=whole(-1, 1024))
    SKIP_DAMAGED: bool = field(default=False, metadata=TRUTH)
    HORIZONTAL_FLIP: bool = field(metadata=TRUTH)
    UNET_DIM: int = field(metadata=whole(8, 1024))
    DIM_MULTS: tuple[int, ...] = field(metadata=wholes(1, 6, high=64))
    NUM_RES_BLOCKS: int = field(metadata=whole(1, 100))
    ATTENTION_RESOLUTIONS: tuple[int, ...] = field(metadata=wholes(0, 16, high=1024))
    DROPOUT: float = field(metadata=number(0, 1, without=1))
    CLASS_CONDITIONAL: bool = field(metadata=TRUTH)
    LABEL_DROPOUT: float = field(metadata=number(0, 1, without=1))
    ACTIVATION_CHECKPOINTING: bool = field(metadata=TRUTH)
    TIME_STEPS: int = field(metadata=whole(2, 100_000))
    BETA_SCHEDULE: str = field(metadata=choice("linear", "cosine"))
    PREDICTION: str = field(metadata=choice("eps", "v", "x0"))
    MIN_SNR_GAMMA: float = field(metadata=number(0, 1000))
    BATCH_SIZE: int = field(metadata=whole(1, 1_000_000))
    GRAD_ACCUM_STEPS: int = field(metadata=whole(1, 1_000_000))
    LEARNING_RATE: float = field(metadata=number(0, 10, without=0))
    LR_SCHEDULE: str = field(default="constant", metadata=choice("constant", "cosine", "linear"))
    WARMUP_STEPS: int = field(metadata=whole(0))
    EPOCHS: int = field(metadata=whole(1, 1_000_000))
    GRAD_CLIP: float = field(metadata=number(0, 1e9))
    EMA_DECAY: float = field(metadata=number(0, 1, without=1))
    PRECISION: str = field(metadata=choice("auto", "fp32", "bf16", "fp16"))
    COMPILE: str = field(metadata=choice("auto", "true", "false", nargs="?", const="true"))  # True in config.py is "true"
    SEED: int = field(metadata=whole(0, 2**32 - 1))
    DEVICE: str = field(metadata=choice("auto", "cuda", "mps", "cpu"))
    VAL_IMAGES: int = field(metadata=whole(1))
    NUM_SAMPLES: int = field(metadata=whole(1, 10_000))
    PREVIEW_STEPS: int = field(metadata=whole(1, 100_000))
    PREVIEW_GUIDANCE: float = field(default=1.0, metadata=number(0, 100))
    VAL_EVERY: int = field(default=1, metadata=whole(1))
    SAVE_EVERY: int = field(metadata=whole(1))
    SAVE_MINUTES: float = field(metadata=number(0, 100_000))
    SAMPLE_EVERY: int = field(metadata=whole(1))
    LOG_EVERY: int = field(metadata=whole(1))
    RUN: str = field(default="", metadata=RUN)
    CHECKPOINT_PATH: str = field(metadata=PATH)
    OUTPUT_PATH: str = field(metadata=PATH)
    LOG_PATH: str = field(metadata=PATH)

    def folder(self, name: str) -> Path:
        """CHECKPOINT_PATH, OUTPUT_PATH or LOG_PATH of this run: RUN is a sub-folder of each."""
        return Path(getattr(self, name), self.RUN)

    @property
    def guidance(self) -> float:
        """What previews are drawn with. Only a network that has seen hidden labels can be guided."""
        return self.PREVIEW_GUIDANCE if self.CLASS_CONDITIONAL and self.LABEL_DROPOUT else 1.0


KINDS = {setting.name: dict(setting.metadata) for setting in fields(Settings)}
IN_TABLE = "config.py: {}[{!r}] sets "


class Run(NamedTuple):
    """What `python train.py ...` asks for."""

    settings: Settings
    typed: frozenset[str]  # names of the flags that were given
    preset: str | None = None
    max_steps: int | None = None
    accept_changes: bool = False  # resume although settings differ from the checkpoint's
    init_from: str | None = None  # checkpoint whose weights a new run starts from

    def limit(self, steps_per_epoch: int) -> tuple[int, str]:
        """The last optimizer step, and what sets it. A typed --max_steps beats EPOCHS, unless typed --epochs end earlier."""
        steps = self.settings.EPOCHS * steps_per_epoch
        if self.max_steps is None or ("epochs" in self.typed and steps < self.max_steps):
            return steps, f"EPOCHS {self.settings.EPOCHS}"
        return self.max_steps, f"--max_steps {self.max_steps}"


def resolve(config: ModuleType, argv: Sequence[str], dataset_names: Any = None, network_of: Any = None) -> Run:
    """Settle every setting: a flag beats the network of --init_from, that a preset, that SOURCES, and that the constant.
    argv: the words behind `train.py`.   dataset_names: what DATASET may be; None leaves that unchecked.
    network_of: (folder of the run, checkpoint of --init_from) -> the settings that shape the network; None: there are none."""
    constants, presets, sources = read_config(config)
    flags = vars(train_flags(config, constants, presets, sources).parse(argv))
    of_run = {name: flags[name] for name in Run._fields if name in flags["typed"]}
    typed = {name.upper(): flags[name] for name in flags["typed"] - of_run.keys()}
    changes = presets[of_run["preset"]] if "preset" in of_run else {}
    chosen, origin = constants | changes | typed, of_run.get("init_from")
    dataset, own = chosen["DATASET"], source_of(chosen["DATASET"], constants, sources)
    network = network_of(Path(chosen["CHECKPOINT_PATH"], chosen["RUN"]), origin) if network_of and origin else {}
    settings = Settings(**constants | own | changes | network | typed)
    places = dict.fromkeys(constants, "config.py: ") | dict.fromkeys(own, IN_TABLE.format("SOURCES", dataset))
    places |= dict.fromkeys(changes, IN_TABLE.format("PRESETS", of_run.get("preset")))
    places |= dict.fromkeys(network, f"{origin} has ")
    check_combinations(settings, {name: place for name, place in places.items() if name not in typed}, dataset_names)
    return Run(settings, **of_run | {"typed": frozenset(flags["typed"])})


def source_of(dataset: str, constants: Mapping[str, Any], sources: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What stands in for the constants: its row of SOURCES, else a folder of its own, but for the DATASET of config.py."""
    return sources.get(dataset, {} if dataset == constants["DATASET"] else {"DATA_PATH": f"./data/{dataset}"})


def train_flags(config: ModuleType, constants: Mapping[str, Any], presets: Mapping, sources: Mapping) -> FlagParser:
    """The flags of train.py: those of a run, then one for each constant, grouped as config.py is."""
    wrap = textwrap.TextWrapper(98, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    tables = []
    for title, table in {"presets:": presets, "datasets with a source of their own:": sources}.items():
        tables += [title, *(wrap.fill(f"{name}: {as_flags(changes)}") for name, changes in table.items() if changes)]
    preset = ("preset", choice(*presets, type=str, metavar="NAME"), None, "a group of settings, listed below")
    groups: dict[str, list] = {"this run": [preset] if presets else []}
    comments = read_comments(config)
    for name, kind in KINDS.items():
        section, comment = comments.get(name, ("settings", ""))
        comment = f"{comment} (default: {as_text(constants[name]) or 'none'})".strip()
        groups.setdefault("this run" if name == "RUN" else section, []).append((name.lower(), kind, None, comment))
    groups["this run"] += [
        ("max_steps", whole(1), None, "optimizer steps in all, also past EPOCHS (default: EPOCHS alone)"),
        ("accept_changes", TRUTH, False, "resume although settings of the training differ from the checkpoint's"),
        ("init_from", PATH, None, "start a new run with the network and the weights of this checkpoint, as far as they fit"),
    ]
    description = "Train a diffusion model. A flag beats a preset, a preset beats config.py."
    examples = ["--preset demo", "--run birds --preset small --dataset folder --data_path birds"]
    rows = [row for title, group in groups.items() for row in (title, *group)]
    return FlagParser("train.py", rows, description, examples, epilog="\n".join(tables))


def read_config(config: ModuleType) -> list[dict[str, Any]]:
    """The constants, PRESETS and SOURCES of config.py, checked. Raises UserError."""
    constants = {name: value for name, value in vars(config).items() if name.isupper() and not name.startswith("_")}
    tables = []
    for table in ("PRESETS", "SOURCES"):
        rows = constants.pop(table, {})
        if not isinstance(rows, dict) or not all(isinstance(changes, dict) for changes in rows.values()):
            raise UserError(f"config.py: {table} is not a dict of dicts; expected {{'name': dict(BATCH_SIZE=64), ...}}.")
        tables.append({name: checked(changes, IN_TABLE.format(table, name)) for name, changes in rows.items()})
    found = checked(constants, "config.py: ")
    for name in [name for name in KINDS if name not in found]:
        raise UserError(f"config.py has no {name}; set {name} to {KINDS[name]['type'].__name__}.")
    return [found, *tables]


def checked(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The values as flags would give them. place: where they stand. Raises UserError."""
    found = {}
    for name, value in values.items():
        if name not in KINDS:
            hint = did_you_mean(name, [*KINDS, "PRESETS", "SOURCES"])
            raise UserError(f"{place}{name}: no such setting{hint} Write names of your own in lower case.")
        try:
            if isinstance(value, str) and re.search(r"[\a\b\f\n\r\t\v]", value):  # "D:\new"
                raise argparse.ArgumentTypeError(f"got {value!r}, which has a control character; write \\ as / or as \\\\")
            found[name] = KINDS[name]["type"](value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{place}{name}: {error}.") from None
        except (TypeError, ValueError):
            raise UserError(f"{place}{name} = {value!r}, expected {KINDS[name]['type'].__name__}.") from None
    return found


# A section, or a constant and its comment, which may go on in indented lines below.
COMMENT = r"(?m)^(?:# -+ (.+?) -+|([A-Z]\w*) = .*?(?: # (.+(?:\n {4,}# .+)*))?)$"


def read_comments(config: ModuleType) -> dict[str, tuple[str, str]]:
    """{constant: (section, comment)} from the source of config.py."""
    try:
        source = inspect.getsource(config)
    except (OSError, TypeError):  # a module made in memory has none
        source = ""
    section, comments = "settings", {}
    for heading, name, comment in re.findall(COMMENT, source):
        section = heading or section
        if name:
            comments[name] = section, re.sub(r" *\n *#", "", comment)
    return comments


def check_combinations(s: Settings, places: Mapping[str, str], dataset_names: Collection[str] | None = None) -> None:
    """Refuse settings that are allowed one by one, but not together. places: where those stand that are no flags."""

    def refuse(names: str, allowed: str) -> NoReturn:
        values = {name: getattr(s, name) for name in names.split()}
        found = [f"{places[n]}{n} = {v!r}" if n in places else as_flags({n: v}) for n, v in values.items()]
        error = UserError if values.keys() <= places.keys() else FlagError
        beside = f" with {' and '.join(found[1:])}" if found[1:] else ""
        raise error(f"{found[0]}{beside}: allowed are {allowed}.")

    def nearest(value: int, allowed: Sequence[int]) -> str:
        return " or ".join(map(str, sorted(sorted(allowed, key=lambda n: abs(n - value))[:2])))

    if dataset_names is not None and s.DATASET not in dataset_names:
        refuse("DATASET", ", ".join(dataset_names))
    # GroupNorm has 8 groups in networks narrower than 128, else 32: norm_groups in src/model.py. A test compares them.
    dims = [dim for dim in range(8, 1025, 8) if dim < 128 or dim % 32 == 0]
    if s.UNET_DIM not in dims:
        refuse("UNET_DIM", f"multiples of 8 below 128 and of 32 from there on, for example {nearest(s.UNET_DIM, dims)}")
    factor = 2 ** (len(s.DIM_MULTS) - 1)  # each level but the last halves the image, and the last needs 2x2 pixels
    sizes = range(max(8, 2 * factor), 1025, factor)
    if s.IMAGE_SIZE not in sizes:
        fits = max(n for n in range(1, len(s.DIM_MULTS)) if s.IMAGE_SIZE % 2 ** (n - 1) == 0 and s.IMAGE_SIZE >> n)
        allowed = f"multiples of {factor} from {sizes.start} on, for example {nearest(s.IMAGE_SIZE, sizes)}, or as it is with "
        allowed += as_flags({"DIM_MULTS": s.DIM_MULTS[:fits]})
        refuse("IMAGE_SIZE DIM_MULTS", allowed)
    levels = [s.IMAGE_SIZE >> level for level in range(len(s.DIM_MULTS))]
    # Only flags: a constant or a preset may name the levels of several image sizes.
    if "ATTENTION_RESOLUTIONS" not in places and not set(s.ATTENTION_RESOLUTIONS) <= set(levels):
        refuse("ATTENTION_RESOLUTIONS IMAGE_SIZE DIM_MULTS", f"0 and the sizes of the levels, {as_text(levels)}")
    if s.PRECISION == "fp16" and s.DEVICE == "cpu":
        refuse("PRECISION DEVICE", "fp32 and bf16 on a CPU")


# --- settings as values: printed, compared, read back ---------------------------------------------------


def as_text(value: Any) -> str:
    """The value as one types it: `1,2,2` for a tuple, `0` for an empty one, `true` for True."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "0"
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_flags(settings: Mapping[str, Any]) -> str:
    """Settings as the words of a command line, for messages: `--unet_dim 32 --dim_mults 1,2,2 --compile false`."""
    pairs = [(name.lower(), as_text(value)) for name, value in settings.items()]
    return " ".join(f"--{name}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}" for name, value in pairs)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of each setting that is not the same in both; None where one lacks it."""
    pairs = [(name, old.get(name), new.get(name)) for name in {**old, **new}]
    return [(name, a, b) for name, a, b in pairs if as_text(a) != as_text(b)]  # a list may stand for a tuple


def changed_from_defaults(settings: Settings, config: ModuleType) -> list[tuple[str, Any, Any]]:
    """(name, value in config.py for its dataset, value of this run) of each setting that a preset or a flag changed."""
    constants, _, sources = read_config(config)
    return differences(constants | source_of(settings.DATASET, constants, sources), asdict(settings))


def settings_from_dict(saved: Mapping[str, Any]) -> Settings:
    """The settings of a checkpoint. Those that are newer than it take their defaults. Raises UserError."""
    for name in [name for name in saved if name not in KINDS]:
        raise UserError(f"The checkpoint has a setting {name} that this program does not know. Update this program (git pull).")
    for f in fields(Settings):
        if f.default is MISSING and f.name not in saved:
            raise UserError(f"The checkpoint has no setting {f.name}; another program wrote it. Use another checkpoint.")
    paths = {name: value for name, value in saved.items() if KINDS[name]["type"] is PATH["type"] and isinstance(value, str)}
    others = {name: value for name, value in saved.items() if name not in paths}
    try:
        return Settings(**checked(others, "The checkpoint has ") | paths)  # what was typed is expanded already
    except UserError as error:
        raise UserError(f"{error} Use another checkpoint.") from None
