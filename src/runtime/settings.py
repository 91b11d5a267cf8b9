"""What a run may be told, and how: config.py, then a preset, then the flags -> one immutable `Settings`.

config.py is the home of the values and of the comments that `--help` prints; RULES is the home of what each may be.
Every refusal is one sentence that names the place, what was given and what is allowed: a FlagError for what was
typed, a UserError for what stands in config.py. Nothing here imports torch, so `--help` and refusals are instant.
"""

import difflib
import inspect
import io
import re
import shlex
import shutil
import textwrap
import tokenize
from collections import namedtuple
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from src.runtime.flags import (
    FOLDER,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    TRUTH,
    FlagParser,
    Rule,
    choice,
    did_you_mean,
    text,
    whole,
    wholes,
)
from src.utils import FlagError, UserError

RULES: dict[str, Rule] = {
    "DATASET": text("the name of a dataset", r".*\S.*", "NAME"),  # which there are is src/dataset.py's to say
    "DATA_PATH": FOLDER,
    "DATA_URL": text("an address that begins with http:// or https://", r"https?://\S+", "URL"),
    "DATA_SIZE": whole(0),
    "DATA_MD5": text("32 hexadecimal digits in lower case, or ''", r"([0-9a-f]{32})?", "MD5"),
    "CACHE_PATH": FOLDER,
    "IMAGE_SIZE": whole(8, 1024),
    "NUM_WORKERS": whole(-1),
    "HORIZONTAL_FLIP": TRUTH,
    "UNET_DIM": whole(8, 1024),
    "DIM_MULTS": wholes("1 to 6 whole numbers of at least 1", 1, 6),
    "NUM_RES_BLOCKS": whole(1),
    "ATTENTION_RESOLUTIONS": wholes("0 for none, or whole numbers of at least 1", 0),
    "DROPOUT": SHARE,
    "CLASS_CONDITIONAL": TRUTH,
    "LABEL_DROPOUT": SHARE,
    "ACTIVATION_CHECKPOINTING": TRUTH,
    "TIME_STEPS": whole(2),
    "BETA_SCHEDULE": choice("linear", "cosine"),
    "PREDICTION": choice("eps", "v", "x0"),
    "MIN_SNR_GAMMA": NOT_NEGATIVE,
    "BATCH_SIZE": whole(1),
    "GRAD_ACCUM_STEPS": whole(1),
    "LEARNING_RATE": POSITIVE,
    "WARMUP_STEPS": whole(0),
    "EPOCHS": whole(1),
    "GRAD_CLIP": NOT_NEGATIVE,
    "EMA_DECAY": SHARE,
    "PRECISION": choice("auto", "fp32", "bf16", "fp16"),
    "COMPILE": choice("auto", "true", "false", bare="true"),  # a word, also where config.py has True or False
    "SEED": whole(0, 2**32 - 1),
    "DEVICE": choice("auto", "cuda", "mps", "cpu"),
    "VAL_IMAGES": whole(1),
    "NUM_SAMPLES": whole(1),
    "PREVIEW_STEPS": whole(1),
    "SAVE_EVERY": whole(1),
    "SAVE_MINUTES": NOT_NEGATIVE,
    "SAMPLE_EVERY": whole(1),
    "LOG_EVERY": whole(1),
    "CHECKPOINT_PATH": FOLDER,
    "OUTPUT_PATH": FOLDER,
    "LOG_PATH": FOLDER,
}


class Settings(namedtuple("Settings", RULES)):  # type: ignore[misc]
    """What a run works with: settings.BATCH_SIZE and so on, each as its rule makes it. Immutable."""

    __slots__ = ()
    if TYPE_CHECKING:  # a type checker does not run RULES for the names

        def __init__(self, **values: Any): ...
        def __getattr__(self, name: str) -> Any: ...


class Run(NamedTuple):
    """What `python train.py ...` asks for."""

    settings: Settings
    preset: str | None
    max_steps: int | None  # optimizer steps in all; None for all EPOCHS
    accept_changes: bool  # a resumed run may go on with other settings than the checkpoint's


def resolve(config: ModuleType, argv: Sequence[str], dataset_names: Collection[str] | None = None) -> Run:
    """Settle every constant: a flag beats a preset, a preset beats config.py. `--help` prints and exits.

    argv: the words behind `train.py`.   dataset_names: what DATASET may be; None leaves that unchecked.
    """
    constants, presets = read_constants(config), read_presets(config)
    flags: dict[str, Any] = {"preset": None, "max_steps": None, "accept_changes": False}
    flags |= train_flags(config, constants, presets).parse(argv)
    preset, max_steps, accept_changes = (flags.pop(name) for name in ("preset", "max_steps", "accept_changes"))
    changes = presets.get(preset, {})
    typed = {name.upper(): value for name, value in flags.items()}
    settings = Settings(**constants | changes | typed)
    sources = dict.fromkeys(RULES, "config.py: ")
    sources |= dict.fromkeys(changes, in_preset(preset)) | dict.fromkeys(typed, "--")
    check_combinations(settings, sources, dataset_names)
    return Run(settings, preset, max_steps, accept_changes)


def train_flags(config: ModuleType, constants: Mapping, presets: Mapping[str, Mapping]) -> FlagParser:
    """The flags of train.py: those of a run itself, then one per constant, grouped as config.py is."""
    columns = max(40, shutil.get_terminal_size().columns)  # some terminals have 0
    wrap = textwrap.TextWrapper(columns - 2, break_on_hyphens=False)
    wrap.initial_indent, wrap.subsequent_indent = "  ", "    "
    listed = [wrap.fill(f"{preset}: {as_flags(changes)}") for preset, changes in presets.items()]
    parser = FlagParser(
        "train.py",
        usage="python train.py [--preset NAME] [--flag VALUE ...]",
        description="Train a diffusion model. A flag beats a preset, a preset beats config.py.",
        epilog="\n".join(["presets:", *listed]),
    )
    run = parser.add_argument_group("this run")
    if presets:
        parser.add("--preset", choice(*presets, metavar="NAME"), "a group of settings, listed below", run)
    parser.add("--max_steps", whole(1), "end after this many optimizer steps in all (default: all EPOCHS)", run)
    accepted = "resume although settings of the training differ from the checkpoint's (default: false)"
    parser.add("--accept_changes", TRUTH, accepted, run)

    comments, groups = read_comments(config), {}
    for name, rule in RULES.items():
        section, comment = comments.get(name, ("settings", ""))
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        comment = f"{comment} (default: {as_text(constants[name]) or 'none'})".strip()
        parser.add(f"--{name.lower()}", rule, comment, groups[section])
    return parser


# --- what cannot be -------------------------------------------------------------------------------------


def check_combinations(
    s: Settings, sources: Mapping[str, str] = MappingProxyType({}), dataset_names: Collection[str] | None = None
) -> None:
    """Refuse what the rules allow one by one, but the network, the sampler or the device cannot do together.

    sources: where the value of each constant comes from, in the words of `given`; by default all are flags.
    """

    def refuse(names: str, allowed: str) -> NoReturn:
        first, *others = sorted(names.split(), key=lambda name: sources.get(name, "--") != "--")  # blame what was typed
        source = sources.get(first, "--")
        said = [as_flags({n: getattr(s, n)}) if source == "--" else f"{n} = {getattr(s, n)!r}" for n in others]
        beside = f" with {' and '.join(said)}" if said else ""
        error = FlagError if source == "--" else UserError
        raise error(f"{given(first, getattr(s, first), source)}{beside}; {allowed}.")

    if dataset_names is not None and s.DATASET not in dataset_names:
        refuse("DATASET", f"allowed are {', '.join(dataset_names)}")

    # GroupNorm has 8 groups in networks narrower than 128, else 32: src/model.py, norm_groups. A test compares them.
    widths = [dim for dim in range(8, 1025, 8) if dim < 128 or dim % 32 == 0]
    if s.UNET_DIM not in widths:
        near = neighbours(s.UNET_DIM, widths)
        refuse("UNET_DIM", f"allowed are multiples of 8 below 128 and of 32 from there on, for example {near}")

    halvings = len(s.DIM_MULTS) - 1
    sizes = range(max(8, 2 * 2**halvings), 1025, 2**halvings)  # 2x2 pixels or more at the last level
    if s.IMAGE_SIZE not in sizes:
        allowed = f"multiples of {sizes.step} from {sizes.start} on, for example {neighbours(s.IMAGE_SIZE, sizes)}"
        refuse("IMAGE_SIZE DIM_MULTS", f"the network shrinks images {sizes.step}-fold, so allowed sizes are {allowed}")

    # Only where typed: what config.py or a preset says may be meant for several image sizes.
    levels = [s.IMAGE_SIZE >> level for level in range(halvings + 1)]
    if sources.get("ATTENTION_RESOLUTIONS") == "--" and not set(s.ATTENTION_RESOLUTIONS) <= set(levels):
        refuse("ATTENTION_RESOLUTIONS IMAGE_SIZE DIM_MULTS", f"allowed are 0 and the levels' sizes {as_text(levels)}")

    if s.PRECISION == "fp16" and s.DEVICE == "cpu":
        refuse("PRECISION DEVICE", "allowed on a CPU are fp32 and bf16")


def given(name: str, value: Any, source: str) -> str:
    """How a sentence on a bad value begins: `--batch_size: got 'many'` if the source is "--", which is a flag, else
    `config.py: BATCH_SIZE = 'many'` or `config.py: PRESETS['demo'] sets BATCH_SIZE = 'many'`."""
    if source == "--":
        return f"--{name.lower()}: got {repr(value) if isinstance(value, str) else as_text(value)}"
    return f"{source}{name} = {value!r}"


def in_preset(preset: str | None) -> str:
    return f"config.py: PRESETS[{preset!r}] sets "


def neighbours(value: int, allowed: Sequence[int]) -> str:
    """The allowed numbers on either side of one that is not."""
    below, above = [n for n in allowed if n < value][-1:], [n for n in allowed if n > value][:1]
    return " or ".join(map(str, below + above))


# --- config.py ------------------------------------------------------------------------------------------


def read_constants(config: ModuleType) -> dict[str, Any]:
    """Every constant of config.py, checked: those of RULES, no more and no fewer."""
    known = [*RULES, "PRESETS"]
    found = [name for name in vars(config) if name.isupper() and not name.startswith("_")]
    missing = [name for name in known if name not in found]
    for stranger in [name for name in found if name not in known]:
        if meant := difflib.get_close_matches(stranger, missing, 1):
            raise UserError(f"config.py has {stranger} where it needs {meant[0]}; rename it.")
        advice = "Remove it, or write a name of your own in lower case."
        raise UserError(f"config.py: {stranger} is not a constant of a run{did_you_mean(stranger, known)} {advice}")
    if missing:
        expected = RULES[missing[0]].expected if missing[0] in RULES else "a dict, which may be empty"
        raise UserError(f"config.py has no {' and no '.join(missing)}; set {missing[0]} to {expected}.")
    return {name: checked(name, getattr(config, name), "config.py: ") for name in RULES}


def read_presets(config: ModuleType) -> dict[str, dict[str, Any]]:
    """The presets of config.py, checked, those too that this run does not take."""
    presets = config.PRESETS
    if not isinstance(presets, dict) or not all(isinstance(changes, dict) for changes in presets.values()):
        raise UserError("config.py: PRESETS is not a dict of dicts; expected {'name': dict(BATCH_SIZE=64), ...}.")
    for preset, changes in presets.items():
        for name in changes:
            if name not in RULES:
                raise UserError(f"{in_preset(preset)}{name}, which is not a constant{did_you_mean(name, RULES)}")
    return {
        preset: {name: checked(name, value, in_preset(preset)) for name, value in changes.items()}
        for preset, changes in presets.items()
    }


def checked(name: str, value: Any, source: str) -> Any:
    """The value as its rule makes it. Raises UserError."""
    try:
        return RULES[name].accept(value)
    except ValueError:
        raise UserError(f"{given(name, value, source)}, expected {RULES[name].expected}.") from None


def read_comments(config: ModuleType) -> dict[str, tuple[str, str]]:
    """{constant: (section, comment)} from the source of config.py, whose sections are headed `# --- data ---`.

    A comment may go on in the lines right below its constant that hold nothing else and are indented by 4 or more.
    """
    try:
        source = inspect.getsource(config)
    except (OSError, TypeError):  # a module made in memory has none, and --help does without
        return {}
    comments: dict[str, tuple[str, str]] = {}
    section, name = "settings", ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        column, words = token.start[1], token.string.lstrip("# ")
        if token.type == tokenize.NAME and column == 0:
            name = token.string
        elif token.type == tokenize.COMMENT and column >= 4 and name in RULES:
            comments[name] = (section, f"{comments.get(name, ('', ''))[1]} {words}".strip())
        elif token.type == tokenize.COMMENT or not token.line.strip():
            name = ""
            if heading := re.fullmatch(r"-+ (.+?) -+", words):
                section = heading[1]
    return comments


# --- settings as values: printed, compared, read back ---------------------------------------------------


def as_text(value: Any) -> str:
    """The value as one types it: `1,2,2` for a tuple, `0` for an empty one, `true` for True."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "0"
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_flags(settings: Mapping[str, Any]) -> str:
    """Settings as the words of a command line, for messages: `--unet_dim 32 --dim_mults 1,2,2 --compile false`."""
    words = []
    for name, value in settings.items():
        gap = "=" if as_text(value).startswith("-") else " "
        words.append(f"--{name.lower()}{gap}{shlex.quote(as_text(value))}")
    return " ".join(words)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of each setting that is not the same in both; None where one lacks it."""
    pairs = [(name, old.get(name), new.get(name)) for name in {**old, **new}]
    return [(name, a, b) for name, a, b in pairs if as_text(a) != as_text(b)]  # a list may stand for a tuple


def changed_from_defaults(settings: Settings, config: ModuleType) -> list[tuple[str, Any, Any]]:
    """(name, value in config.py, value of this run) of each setting that a preset or a flag changed."""
    return differences(read_constants(config), settings._asdict())


def settings_from_dict(saved: Mapping[str, Any]) -> Settings:
    """The settings that a checkpoint carries, checked like any others. Raises UserError."""
    advice = "another version of this program wrote it. Use that version, or train again."
    for name in [*RULES, *saved]:
        if (name in RULES) != (name in saved):
            problem = "has no" if name in RULES else "has an unknown"
            raise UserError(f"The checkpoint {problem} setting {name}: {advice}")
    try:
        return Settings(**{name: checked(name, value, "") for name, value in saved.items()})
    except UserError as error:
        raise UserError(f"The checkpoint has {str(error).rstrip('.')}: {advice}") from None
