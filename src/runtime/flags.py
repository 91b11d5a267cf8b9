"""argparse for all scripts: kinds of values, and one sentence for each flag or value that is refused. Imports no torch.

A kind is a dict of keyword arguments: `group.add_argument("--steps", **whole(1, 1000), help="...")`. Its type reads the text
of a flag or the value of a constant, and has a name that completes "expected ...".
"""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from src.utils import FlagError

Kind = dict[str, Any]

# What our flags are called in other repositories. A hint names the first of ours that the script has.
ELSEWHERE = dict(
    learning_rate="lr base_lr", batch_size="b bs batch", epochs="epoch n_epochs num_epochs", ema_decay="ema ema_rate",
    grad_accum_steps="accumulation_steps gradient_accumulation_steps", grad_clip="clip max_grad_norm", prediction="objective",
    steps="num_steps n_steps ddim_steps sampling_steps num_inference_steps", max_steps="steps num_steps iters train_steps",
    time_steps="t timesteps num_timesteps diffusion_steps", beta_schedule="schedule noise_schedule", unet_dim="dim",
    dim_mults="ch_mult channel_mult", image_size="size img_size res resolution", class_conditional="cond class_cond",
    device="gpu gpus gpu_id gpu_ids device_id cuda", precision="amp fp16 bf16 mixed_precision", num_workers="j workers",
    data_path="data data_dir dataset_path root", output_dir="o out outdir output output_path save_dir",
    output_path="o out outdir output output_dir save_dir", checkpoint="ckpt model checkpoint_path resume resume_from",
    checkpoint_path="ckpt checkpoint checkpoint_dir resume resume_from", save_every="save_interval save_freq",
    log_every="log_interval log_freq", sample_every="sample_interval", num_samples="n n_samples num_images",
    guidance="w cfg cfg_scale guidance_scale", classes="y labels class_labels",
)  # fmt: skip


def kind(expected: str, read: Callable[[Any], Any], is_allowed: Callable[[Any], bool], **options: Any) -> Kind:
    def accept(value: Any) -> Any:
        found = read(value)
        if not is_allowed(found):
            raise ValueError
        return found

    accept.__name__ = expected
    return {"type": accept} | options


def whole(low: int, high: int = 10**9) -> Kind:  # by way of str, because int() takes 1.5 and True for 1
    return kind(f"a whole number from {low} to {high}", lambda x: int(str(x)), lambda n: low <= n <= high, metavar="N")


def number(low: float, high: float, without: float | None = None) -> Kind:
    """without: one of the two ends, if that is not allowed."""
    bounds = ("above" if without == low else "of at least", low, "below" if without == high else "at most", high)
    expected = "a number {} {:g} and {} {:g}".format(*bounds)
    return kind(expected, lambda x: float(str(x)), lambda x: low <= x <= high and x != without, metavar="X")


def wholes(fewest: int, most: int, high: int) -> Kind:
    """Whole numbers from 1 on: "1,2,2", a tuple, a list, or one alone. "" and 0 are none."""

    def read(value: Any) -> tuple[int, ...]:
        parts = value if isinstance(value, (tuple, list)) else str(value).split(",") if str(value).strip() else ()
        numbers = tuple(int(str(part)) for part in parts)
        return () if numbers == (0,) else numbers

    expected = f"{fewest} to {most}" if fewest else f"0 for none, or up to {most}"
    expected += f" whole numbers from 1 to {high}, separated by commas"
    return kind(expected, read, lambda x: fewest <= len(x) <= most and all(1 <= n <= high for n in x), metavar="N,N")


def choice(*words: Any, **options: Any) -> Kind:
    """One of the words, in upper or lower case; of other values with a type for them."""
    return {"type": lambda value: str(value).lower(), "choices": words, "metavar": "WORD"} | options


def text(expected: str, pattern: str, metavar: str) -> Kind:
    return kind(expected, str, lambda x: re.fullmatch(pattern, x, re.DOTALL) is not None, metavar=metavar)


def read_path(value: Any) -> str:
    """The path, with the home folder for ~ and values for $NAME."""
    for part in re.findall(r"^~[^/]*|\$\w+|\$\{\w+\}", str(value)):
        if os.path.expanduser(os.path.expandvars(part)) in (part, ""):
            raise argparse.ArgumentTypeError(f"got {str(value)!r}, but {part} is not set")
    return os.path.expanduser(os.path.expandvars(value))


PATH = kind("a path", read_path, lambda path: bool(path.strip()), metavar="PATH")
CLASSES = kind(
    "names, ids or indices of classes, separated by commas",
    lambda x: x if isinstance(x, str) else ",".join(map(str, x)),
    lambda x: not x or bool(x.strip()),
    metavar="NAMES",
)
RUN = text("a name of letters, digits, '-', '_' and '.'", r"(?!\.)[\w.-]*", "NAME")
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
TRUTH = kind("true or false", lambda x: WORDS.get(str(x).lower()), lambda x: x is not None, metavar="BOOL")
TRUTH |= {"nargs": "?", "const": True}  # --gif alone is --gif true


def expected(kind: Mapping[str, Any]) -> str:
    *words, last = map(str, kind.get("choices") or [kind["type"].__name__])
    return f"{', '.join(words)} or {last}" if words else last


class FlagParser(argparse.ArgumentParser):
    """argparse that raises FlagErrors. script: what one types behind `python`."""

    def __init__(self, script: str, **options: Any):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=31)
        super().__init__(script, allow_abbrev=False, add_help=False, formatter_class=layout, **options)
        self.add_argument("--help", action="help", help="show this text and exit")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags. Of two alike the last counts. Raises FlagError."""
        words = ["--help" if word == "-h" else word for word in argv]  # as a flag, -h would catch -horizontal_flip
        for i in range(len(words) - 1, 0, -1):  # argparse would take -1e-4 for a flag
            if re.match(r"(?i)-(\.?\d|inf|nan)", words[i]) and re.fullmatch(r"--\w+", words[i - 1]):
                words[i - 1 : i + 1] = [f"{words[i - 1]}={words[i]}"]
        flags, strangers = self.parse_known_args(words)
        for word in (stranger.partition("=")[0] for stranger in strangers):
            found = f"{word}: no such flag" if word.startswith("-") else f"{word!r}: a word that belongs to no flag"
            name, known = word.lower().lstrip("-").replace("-", "_"), self._option_string_actions
            meant = [f"--{ours}" for ours, theirs in ELSEWHERE.items() if name in theirs.split()]
            hint = did_you_mean(next((flag for flag in meant if flag in known), "" if meant else f"--{name}"), known)
            raise FlagError(f"{found}{hint} 'python {self.prog} --help' lists them.")
        return flags

    def error(self, message: str) -> NoReturn:
        """argparse calls this with its complaint."""
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        action = self._option_string_actions.get(flag)
        if action and problem.startswith(("expected ", "invalid ")):
            found = re.search(r"(?:value|choice): ((['\"]?).*?\2)(?:,| \(|$)", problem, re.DOTALL)
            problem = f"{f'got {found[1]}' if found else 'no value given'}, expected {expected(vars(action))}"
        raise FlagError(f"{flag}: {problem}.")


def did_you_mean(word: str, names: Collection[str]) -> str:
    """The end of a sentence on a word that is none of the names."""
    match = difflib.get_close_matches(word, names, 1)
    return f"; did you mean {match[0]}?" if match else "."
