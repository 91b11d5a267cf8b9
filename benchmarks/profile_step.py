"""Where the time of our training step goes, by kernel and by kind, as a Markdown table.

    python -m benchmarks.profile_step --batch 256
    python -m benchmarks.profile_step --batch 16 --variant graphs

On CUDA the times are those of kernels, on a CPU those of torch's operations without what they call. The kinds go by the
names of kernels, and so are a rough sorting: a compiled kernel that fuses a copy with a norm counts as elementwise. Gaps are
what is left of the step's time as measured without the profiler, which slows the launches.
"""

import re
import sys
from collections import Counter
from types import SimpleNamespace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import TRAIN_FLAGS, Row, main, random_images, report, seconds_per_call, settings_for
from benchmarks.ours import VARIANTS, Step
from src.runtime.device import pick_device, synchronize
from src.runtime.flags import choice, whole

TOP = 20

# The first pattern that is found in a name decides. Triton's kernels are called after all that they fuse, so they come first;
# its "tem" are templates of a matrix product or convolution, its "for" are loops over many tensors.
KINDS = [
    ("optimizer, EMA, clipping", r"adam|multi_tensor|foreach|triton_for|lerp|lpnorm|linalg_vector_norm"),
    ("convolutions", r"triton_tem.*conv"),
    ("matmul, attention", r"triton_tem"),
    ("norms, activations, elementwise", r"triton"),
    ("matmul, attention", r"flash|fmha|sdpa|attention|softmax"),
    ("copies, casts", r"memcpy|memset|copy|nchwto|nhwcto|aten::to$|convert|reorder|aten::cat|catarray"),
    ("convolutions", r"fprop|dgrad|wgrad|conv|cudnn"),
    ("matmul, attention", r"gemm|gemv|matmul|nvjet|cublas|cutlass|splitk|aten::(add|ba)?b?mm|aten::linear"),
    ("norms, activations, elementwise", r"norm|silu|elementwise|reduce|aten::|index|vectorized"),
]

COLUMNS = {"what": "name", "ms/step": "{milliseconds:.3f}", "share": "{share:.1%}", "calls/step": "{calls:.1f}"}


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def profiled(step: Step, steps: int, device: torch.device) -> tuple[Counter, Counter]:
    """Microseconds, and calls, by name of the kernel (on a CPU: of the operation), in all steps."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as record:
        for _ in range(steps):
            step()
        synchronize(device)
    times, calls = Counter[str](), Counter[str]()
    for event in record.key_averages():
        if on_gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue  # an operation, or a stretch of them: what it launched has the same time
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time:
            times[event.key] += time
            calls[event.key] += event.count
    return times, calls


def measure(flags: SimpleNamespace) -> None:
    device = pick_device(flags.device)
    steps = flags.steps or (2 if flags.tiny or device.type != "cuda" else 20)
    s = settings_for(flags, batch_size=flags.batch or (2 if flags.tiny else 16 if device.type == "cuda" else 8))
    step = Step(s, device, random_images(2 * s.BATCH_SIZE, s.IMAGE_SIZE), flags.variant)
    for _ in range(4 if device.type == "cuda" else 1):
        step()
    wall = seconds_per_call(step, steps, device)
    times, calls = profiled(step, steps, device)
    total = sum(times.values()) / steps / 1e6  # seconds
    whole_step = max(wall, total)  # on a CPU the profiler may cost more than there is in gaps

    def row(section: str, name: str, microseconds: float, count: float) -> Row:
        seconds = microseconds / steps / 1e6
        share = seconds / whole_step
        return {"section": section, "name": name, "milliseconds": 1000 * seconds, "share": share, "calls": count / steps}

    found = []
    for name, time in times.most_common(TOP):
        short = re.sub(r"\s+|\|", " ", name)  # C++ templates fill lines, and a bar ends a cell
        found.append(row("top", short if len(short) <= 90 else short[:87] + "...", time, calls[name]))
    kinds, kind_calls = Counter[str](), Counter[str]()
    for name, time in times.items():
        kinds[kind_of(name)] += time
        kind_calls[kind_of(name)] += calls[name]
    found += [row("kind", f"**{kind}**", time, kind_calls[kind]) for kind, time in kinds.most_common()]
    found.append(row("kind", "**gaps**", (whole_step - total) * steps * 1e6, 0))
    found.append(row("kind", "**the step**", whole_step * steps * 1e6, steps))
    about = {"batch": s.BATCH_SIZE, "variant": flags.variant or "as train.py", "steps": steps}
    report(flags, device, COLUMNS, found, **about, milliseconds_per_step=1000 * wall)


FLAGS = [
    ("--batch", whole(1), "pictures a step (default: 16 on CUDA, else 8)", None),
    ("--steps", whole(1), "steps profiled (default: 20 on CUDA, else 2)", None),
    ("--variant", choice(*VARIANTS), "how ours is compiled (default: as train.py does)", None),
    TRAIN_FLAGS,
]

if __name__ == "__main__":
    sys.exit(main("profile_step", __doc__, FLAGS, measure))
