"""Take a model elsewhere: `python export.py` writes a folder that Hugging Face diffusers opens, or the weights alone."""

from src.runtime import early

if __name__ == "__main__":
    early.settle()  # before torch is imported

import io
import json
import math
import os
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.model import Attention, UNet, norm_groups
from src.runtime.build import build_diffusion, build_model
from src.runtime.checkpoint import TO_DRAW, TO_TRAIN, VERSION, load_checkpoint, load_weights
from src.runtime.device import DTYPES
from src.runtime.flags import PATH, TRUTH, FlagParser, Rows, choice, command_line
from src.runtime.folders import WHICH_CHECKPOINT, choose_checkpoint, lock_folder
from src.runtime.resume import FREE
from src.runtime.settings import Settings, as_text
from src.runtime.sheets import zoom_of
from src.runtime.signals import run_script
from src.utils import UserError, atomic_file, count, writing

Files = dict[str, bytes]  # content by path inside the output folder


def read_flags(argv: Sequence[str]) -> Namespace:
    """The flags, each checked by itself. Raises FlagError."""
    rows: Rows = [
        "what to write",
        *WHICH_CHECKPOINT,
        ("output_dir", PATH, None, "the folder to write (default: outputs/[NAME/]export)"),
        ("weights_only", TRUTH, False, "only weights.pth, for sample.py, evaluate.py and train.py --init_from"),
        ("dtype", choice(*DTYPES), "fp32", "of the weights: fp32, bf16, fp16"),
    ]
    description = "Write the averaged weights of a checkpoint as a folder that diffusers opens, or alone."
    examples = ["--run demo", "--checkpoint docs/shapes.pth --weights_only --dtype bf16"]
    return FlagParser("export.py", rows, description, examples).parse(argv)


# --- our U-Net as diffusers' UNet2DModel ------------------------------------------------------------------

# Parts of our names, and what UNet2DModel calls them.
NAMES = [
    (r"^stem", "conv_in"), (r"^time_mlp\.0", "time_embedding.linear_1"), (r"^time_mlp\.2", "time_embedding.linear_2"),
    (r"^head\.0", "conv_norm_out"), (r"^head\.2", "conv_out"), (r"^(down|up)\.", r"\1_blocks."),
    (r"^middle\.(\d)\.block\.", r"mid_block.resnets.\1."), (r"^middle\.0\.attention\.", "mid_block.attentions.0."),
    (r"\.blocks\.(\d+)\.block\.", r".resnets.\1."), (r"\.blocks\.(\d+)\.attention\.", r".attentions.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0.conv."), (r"\.(norm|conv)_([12])\.", r".\1\2."),
    (r"\.scale_shift\.", ".time_emb_proj."), (r"\.skip\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."), (r"\.out\.", ".to_out.0."),
]  # fmt: skip


def unet_config(s: Settings, model: UNet) -> dict[str, Any]:
    """config.json of UNet2DModel, as far as it differs from its defaults. Raises UserError for a network it cannot express."""
    layers = {(layer.qkv.in_features, layer.heads) for layer in model.modules() if isinstance(layer, Attention)}
    head_dims = {dim // heads for dim, heads in layers}
    are_single = all(heads == 1 for _, heads in layers)
    if s.DIM_MULTS[0] != 1 or (len(head_dims) > 1 and not are_single):
        found = f"UNET_DIM {s.UNET_DIM}, DIM_MULTS {as_text(s.DIM_MULTS)}, heads of {as_text(sorted(head_dims))} channels"
        needed = "DIM_MULTS must begin with 1, and all heads have the same width. Export the weights alone with --weights_only."
        raise UserError(f"diffusers' UNet2DModel cannot express this network ({found}): {needed}")
    has_attention = [s.IMAGE_SIZE >> level in s.ATTENTION_RESOLUTIONS for level in range(len(s.DIM_MULTS))]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": s.IMAGE_SIZE,
        "in_channels": s.CHANNELS,
        "out_channels": s.CHANNELS,
        "down_block_types": ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in has_attention],
        "up_block_types": ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(has_attention)],
        "block_out_channels": [s.UNET_DIM * mult for mult in s.DIM_MULTS],
        "layers_per_block": s.NUM_RES_BLOCKS,
        "attention_head_dim": None if are_single else head_dims.pop(),  # None: one head, as wide as the layer
        "norm_num_groups": norm_groups(s.UNET_DIM),
        "attn_norm_num_groups": norm_groups(s.UNET_DIM),  # without it the attention in the middle has no norm
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": model.num_classes + 1 if model.num_classes else None,  # the last row: no label
        "dropout": s.DROPOUT,
    }


def unet_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Our weights under the names of UNet2DModel."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        parts = {name: tensor}
        if ".qkv." in name:  # one layer here, three there
            parts = {name.replace("qkv", f"to_{part}"): third for part, third in zip("qkv", tensor.chunk(3))}
        found |= {part: third.to(dtype).contiguous() for part, third in parts.items()}  # a GPU run's may be channels_last
    return found


def scheduler_config(s: Settings) -> dict[str, Any]:
    """The DDPMScheduler that draws as Alg. 2 does, with the variance beta_tilde."""
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": s.TIME_STEPS,
        "trained_betas": build_diffusion(s).betas.tolist(),
        "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[s.PREDICTION],
        "variance_type": "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "timestep_spacing": "trailing",
    }


# --- what is written --------------------------------------------------------------------------------------


def diffusers_files(state: Mapping[str, Any], dtype: torch.dtype) -> Files:
    """A folder for DDPMPipeline.from_pretrained, or with classes for UNet2DModel.from_pretrained. Raises UserError."""
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        advice = "Run 'pip install safetensors', or export the weights alone with --weights_only."
        raise UserError(f"A folder for diffusers needs safetensors, which is not installed. {advice}") from None
    s: Settings = state["config"]
    model = build_model(s, len(state["classes"]))
    load_weights(model, state["ema"])
    unet, scheduler = ("", "") if s.CLASS_CONDITIONAL else ("unet/", "scheduler/")
    files = {
        f"{unet}config.json": as_json(unet_config(s, model)),
        f"{unet}diffusion_pytorch_model.safetensors": save(unet_weights(model.state_dict(), dtype), {"format": "pt"}),
        f"{scheduler}scheduler_config.json": as_json(scheduler_config(s)),
        "README.md": model_card(state, s).encode("utf-8", "replace"),
    }
    if not s.CLASS_CONDITIONAL:
        parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
        files["model_index.json"] = as_json({"_class_name": "DDPMPipeline"} | parts)
    return files


def weights_file(state: Mapping[str, Any], dtype: torch.dtype) -> Files:
    """weights.pth: a checkpoint without what only training needs."""
    kept = {name: value for name, value in state.items() if name not in TO_TRAIN}
    kept |= {"version": VERSION, "config": asdict(state["config"])}
    kept["ema"] = {name: tensor.to(dtype).contiguous() for name, tensor in state["ema"].items()}
    torch.save(kept, buffer := io.BytesIO())
    return {"weights.pth": buffer.getvalue()}


def as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def drawing_code(s: Settings, no_class: int, scheduler: str, prepare: str) -> str:
    """Python that draws with diffusers. no_class: the label that means none.   scheduler, prepare: how it is loaded and set."""
    unet, name, labels, prediction = '"unet"', "scheduler", "", "unet(x, t).sample"
    if s.CLASS_CONDITIONAL:
        unet, name, prediction = '"."', ".", "unet(x, t, class_labels=y).sample"
        labels = f"\ny = torch.arange(8) % {no_class}  # labels"
    if s.guidance != 1:
        labels += f"\nno_class, guidance = torch.full_like(y, {no_class}), {s.guidance:g}  # 1 is none, 0 ignores the labels"
        prediction = "torch.lerp(unet(x, t, class_labels=no_class).sample, unet(x, t, class_labels=y).sample, guidance)"
    return f"""import torch
from diffusers import {scheduler.partition(".")[0]}, UNet2DModel
from torchvision.utils import save_image
unet = UNet2DModel.from_pretrained({unet})  # in this folder
scheduler = {scheduler.format(name)}
scheduler.{prepare}
x = torch.randn(8, {s.CHANNELS}, {s.IMAGE_SIZE}, {s.IMAGE_SIZE})  # noise{labels}
for t in scheduler.timesteps:
    with torch.no_grad():
        prediction = {prediction}
    x = scheduler.step(prediction, t, x).prev_sample
pictures = x.repeat_interleave({(zoom := zoom_of(s.IMAGE_SIZE))}, 2).repeat_interleave({zoom}, 3)  # enlarged
save_image(pictures / 2 + 0.5, "pictures.png")"""


def model_card(state: Mapping[str, Any], s: Settings) -> str:
    """README.md as the Hugging Face hub shows it."""
    loss, classes, no_class = state.get("best_loss", math.inf), "", len(state["classes"])
    facts = {"optimizer steps": state.get("step", "not recorded"), "epochs": state.get("epoch", "not recorded")}
    facts["lowest validation loss so far"] = f"{loss:.5f}" if math.isfinite(loss) else "not recorded"
    facts |= {name: as_text(value) for name, value in asdict(s).items() if name not in FREE}
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    if s.CLASS_CONDITIONAL or s.CLASSES:
        classes = f"\nClasses, by label from 0: {', '.join(state['classes'])}."
    if s.CLASS_CONDITIONAL:
        classes += f" Label {no_class} means no class."
    times = [step.t for step in build_diffusion(s).path(min(20, s.TIME_STEPS))]
    clipped = 'DPMSolverMultistepScheduler.from_pretrained("{}", thresholding=True, sample_max_value=1.0)'
    return f"""---
library_name: diffusers
tags: [ddpm, {"" if s.CLASS_CONDITIONAL else "un"}conditional-image-generation]
---

# A denoising diffusion model of {s.DATASET}, {s.IMAGE_SIZE}x{s.IMAGE_SIZE}

The averaged weights (EMA) of a U-Net, trained as in Ho et al. 2020 (arXiv:2006.11239).
{classes}

{count(len(times), "step")} of DPM-Solver++, as sample.py draws:

```python
{drawing_code(s, no_class, clipped, f"set_timesteps(timesteps={times})")}
```

All {s.TIME_STEPS:,} steps of the paper:

```python
{drawing_code(s, no_class, 'DDPMScheduler.from_pretrained("{}")', f"set_timesteps({s.TIME_STEPS})")}
```

| | |
|---|---|
{table}
"""


def export(flags: Namespace) -> None:
    """Write the files, or nothing at all where one of them is there already. Raises UserError."""
    choose_checkpoint(flags)
    state = load_checkpoint(Path(flags.checkpoint), TO_DRAW, mmap=True)
    files = (weights_file if flags.weights_only else diffusers_files)(state, DTYPES[flags.dtype])
    out = Path(flags.output_dir or Path("outputs", flags.run, "export"))
    with lock_folder(out, "--output_dir", "choose another --output_dir"), writing(out, "--output_dir"):
        if taken := [out / name for name in files if os.path.lexists(out / name)]:
            raise UserError(f"{taken[0]} exists already. Remove it, or choose another folder with --output_dir.")
        for name, content in files.items():
            with atomic_file(out / name) as file:
                file.write(content)
    use = f"{out / 'README.md'} has the code that draws with diffusers"
    if flags.weights_only:
        use = f"Draw pictures with: python sample.py --checkpoint {shlex.quote(str(out / 'weights.pth'))}"
    print(f"Done: {out}, {sum(map(len, files.values())) / 1e6:,.1f} MB. {use}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("export.py", lambda stop: export(read_flags(command_line(argv))), "Stopped at once.")


if __name__ == "__main__":
    sys.exit(main())
