"""argparse for all scripts: kinds of values, and one sentence for each flag or value that is refused. Imports no torch.

A kind is a dict of keyword arguments: `group.add_argument("--steps", **whole(1, 1000))`. Its type reads the text of a flag or
the value of a constant, and has a name that completes "expected ...".
"""

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from src.utils import FlagError

Kind = dict[str, Any]
Rows = Sequence[str | tuple[str, Kind, Any, str]]  # the title of a group; a flag: name, kind, default, what --help says

# What our flags are called in other repositories, also as the last words, two or more, of a name there: train_batch_size.
# A hint names the first of ours that the script has. What is spelled almost like ours needs no place here.
ELSEWHERE = dict(
    save_every="ckpt_every save_interval save_freq save_step checkpointing_steps save_model_epochs", batch_size="b bs batch",
    steps="num_steps n_steps timesteps ddim_steps sampling_steps num_inference_steps subseq_size", run="name exp_name run_name",
    output_path="o out out_dir outdir output output_dir save_dir results_dir results_folder", log_every="log_interval log_freq",
    checkpoint="ckpt model model_path weights_path chkpt_path network resume resume_from", learning_rate="lr base_lr train_lr",
    grad_accum_steps="accumulation_steps grad_accum num_accum gradient_accumulate_every", data_path="data data_dir root folder",
    activation_checkpointing="use_checkpoint checkpointing gradient_checkpointing", guidance="w cfg cfg_scale guidance_scale",
    precision="amp fp16 bf16 use_fp16 dtype mixed_precision mixed_precision_type", classes="y cls label labels class_labels",
    sample_every="sample_interval sample_step demo_every save_images_epochs", log_path="logdir log_dir logging_dir tensorboard",
    output_dir="o out outdir output output_path save_dir sample_dir dest", val_every="eval_interval eval_step evaluate_every",
    init_from="transfer pretrained pretrained_model finetune fine_tune", max_steps="steps iters max_iters total_steps end_step",
    time_steps="t num_timesteps diffusion_steps ddpm_num_steps", checkpoint_path="ckpt ckpt_dir chkpt_dir checkpoint_dir",
    num_samples="n num num_images sample_size total_size", prediction="objective mean_type predict_xstart", epochs="num_epochs",
    device="gpu gpus gpu_id gpu_ids cuda num_gpus", beta_schedule="schedule noise_schedule", ema_decay="ema use_ema ema_rate",
    label_dropout="p_uncond cond_drop_prob", lr_schedule="decay_lr lr_anneal_steps", sampler="solver method ddim use_ddim",
    class_conditional="cond class_cond", horizontal_flip="xflip random_flip", dim_mults="ch_mult channel_mult", reference="ref",
    image_size="size res resolution", grad_clip="clip max_grad_norm", unet_dim="dim ch num_channels", num_workers="j workers",
    samples="images sample_folder", cache_path="cache_dir", warmup_steps="warmup", seed="global_seed",
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
    """One of the words, in upper or lower case; of other values with a type that reads them."""

    def lower(value: Any) -> str:
        if "cuda" in words and (number := re.fullmatch(r"(?:cuda|gpu)?:?(\d+(?:,\d+)*)", str(value).lower())):
            way = f"to choose a GPU, type CUDA_VISIBLE_DEVICES={number[1]} before python, and --device cuda"
            raise argparse.ArgumentTypeError(f"got {value!r}; {way}")
        return str(value).lower()

    expected = " or ".join(", ".join(map(str, words)).rsplit(", ", 1))
    return kind(expected, options.pop("type", lower), lambda x: x in words, **{"metavar": "WORD"} | options)


def text(expected: str, pattern: str, metavar: str) -> Kind:
    return kind(expected, str, lambda x: re.fullmatch(pattern, x, re.DOTALL) is not None, metavar=metavar)


def read_path(value: Any) -> str:
    """The path, with the home folder for ~ and values for $NAME, but for the part of it that exists as typed."""
    path = os.fspath(value)
    there = next((str(p) for p in [Path(path), *Path(path).parents] if "$" in str(p) and os.path.lexists(p)), "")
    rest = path.removeprefix(there)
    for part in re.findall(r"^~[^/]*|\$\w+|\$\{\w+\}", rest):
        if os.path.expanduser(os.path.expandvars(part)) in (part, ""):
            raise argparse.ArgumentTypeError(f"got {path!r}, but {part} is not set")
    return there + os.path.expanduser(os.path.expandvars(rest))


PATH = kind("a path", read_path, lambda path: bool(path.strip()), metavar="PATH")
CLASSES = text("names, ids or indices, separated by commas, or all", r"(.*\S.*)?", "NAMES")
RUN = text("a name of letters, digits, '-', '_' and '.'", r"(?!\.)[\w.-]*", "NAME")
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
TRUTH = kind("true or false", lambda x: WORDS.get(str(x).lower()), lambda x: x is not None, metavar="BOOL")
TRUTH |= {"nargs": "?", "const": True}  # --gif alone is --gif true


def command_line(argv: Sequence[Any] | None, variable: str = "") -> list[str]:
    """The flags of an environment variable, then what was typed behind the script or handed to main(). Raises FlagError."""
    argv = shlex.split(argv) if isinstance(argv, str) else argv
    try:
        before = shlex.split(os.environ.get(variable, ""))
    except ValueError as error:  # a quote that is not closed
        raise FlagError(f"The environment has {variable}={os.environ[variable]!r}: {error}. Correct or unset it.") from None
    return before + (sys.argv[1:] if argv is None else [str(word) for word in argv])


class FlagParser(argparse.ArgumentParser):
    """argparse that raises FlagErrors. script: what one types behind `python`.   examples: the flags of commands that work."""

    def __init__(self, script: str, rows: Rows, description: str = "", examples: Sequence[str] = (), **options: Any):
        options |= {"usage": f"python {script} [--flag VALUE ...]", "allow_abbrev": False, "add_help": False}
        options |= {"description": "\n  ".join([description, *(f"python {script} {words}" for words in examples)])}
        options |= {"formatter_class": partial(argparse.RawDescriptionHelpFormatter, max_help_position=31)}
        super().__init__(script, **options)
        self._negative_number_matcher = re.compile(r"(?i)-(\.?\d|inf|nan)")  # argparse would take -1e-4 for a flag
        group: Any = self
        for row in rows:
            if isinstance(row, str):
                group = self.add_argument_group(row)
                continue
            name, its_kind, default, comment = row
            if default not in (None, "") and not isinstance(default, bool):
                comment += f" (default: {default})"
            group.add_argument(f"--{name}", **its_kind, default=default, help=comment.replace("%", "%%"))
        self.add_argument_group("options").add_argument("--help", action="help", help="show this text and exit")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags; typed: the names of those typed; command: the line. Of two alike the last counts. Raises FlagError."""
        words = ["--help" if word == "-h" else word for word in argv]  # as a flag, -h would catch -horizontal_flip
        flags, strangers = self.parse_known_args(words)
        for word in (stranger.partition("=")[0] for stranger in strangers):
            found = f"{word}: no such flag" if word.startswith("-") else f"{word!r}: a word that belongs to no flag"
            name, known = word.lower().lstrip("-").replace("-", "_"), [flag[2:] for flag in self._option_string_actions]
            if "epochs" in known and re.match("(auto_)?(resume|continue|restart)", name):
                raise FlagError(f"{found}: a run goes on by itself. Type the command that started it, without {word}.")
            parts = name.split("_")
            ends = [name, *("_".join(parts[k:]) for k in range(1, len(parts) - 1))]  # one last word may mean anything
            meant = (ours for end in ends for ours in known if end in (ours, *ELSEWHERE.get(ours, "").split()))
            hint = next((f"; did you mean --{ours}?" for ours in meant), did_you_mean(name, known, "--"))
            raise FlagError(f"{found}{hint} 'python {self.prog} --help' lists them.")
        flags.command = shlex.join(["python", self.prog, *argv])
        flags.typed = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        return flags

    def error(self, message: str) -> NoReturn:
        """argparse calls this with its complaint."""
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        action = self._option_string_actions.get(flag)
        if action and problem.startswith(("expected ", "invalid ")):
            found = re.search(r"value: (.*)", problem, re.DOTALL)
            problem = f"{f'got {found[1]}' if found else 'no value given'}, expected {vars(action)['type'].__name__}"
        raise FlagError(f"{flag}: {problem}.")


def print_idle(typed: Collection[str], table: Mapping[str, tuple[str, Any]]) -> None:
    """What is typed is used, or said not to be. table: {when: (names of flags that have no effect then, whether it is so)}."""
    for when, (names, is_so) in table.items():
        for name in names.split():
            if is_so and name in typed:
                print(f"note: --{name} has no effect {when}", flush=True)


def did_you_mean(word: str, names: Collection[str], mark: str = "") -> str:
    """The end of a sentence on a word that is none of the names, but may be one mistyped. mark: goes before the name."""
    match = difflib.get_close_matches(word, names, 1, cutoff=0.8)
    return f"; did you mean {mark}{match[0]}?" if match else "."
