"""Where the time of our training step goes, by kernel and by kind, as a Markdown table.

    python -m benchmarks.profile_step --batch 16 --variant graphs

On CUDA the times are those of kernels, on a CPU those of torch's operations without what they call. Kinds go by the names, and
so are rough: a compiled kernel that fuses a copy with a norm counts as elementwise. Gaps are the rest of an unprofiled step.
"""

import re
import sys
from collections import Counter

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.common import Args, Call, Table
from benchmarks.train_step import VARIANTS, Step
from src.runtime.device import pick_device, synchronize

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


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def profiled(step: Call, steps: int, device: torch.device) -> tuple[Counter, Counter]:
    """Milliseconds a step, and calls a step, by name of the kernel (on a CPU: of the operation)."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as record:
        for _ in range(steps):
            step()
        synchronize(device)
    times, calls = Counter[str](), Counter[str]()
    for event in record.key_averages():
        if on_gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue  # an operation, or a stretch of them: what it launched has the same time
        name = re.sub(r"[\s|]+", " ", event.key)[:90]  # C++ templates fill lines, and a bar ends a cell
        times[name] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / steps / 1000
        calls[name] += event.count / steps
    return times, calls


def measure(args: Args) -> None:
    device = pick_device(args.device)
    steps = args.steps or (20 if device.type == "cuda" and not args.tiny else 2)
    s = common.settings_for(args, batch_size=args.batch or (2 if args.tiny else 16 if device.type == "cuda" else 8))
    step = Step(s, device, common.random_images(max(4096, s.BATCH_SIZE), s.IMAGE_SIZE), args.variant)
    common.seconds_per_call(step, 4 if device.type == "cuda" else 1, device)  # warms up
    wall = 1000 * common.seconds_per_call(step, steps, device)
    times, calls = profiled(step, steps, device)
    whole = max(wall, sum(times.values()))  # on a CPU the profiler may cost more than there is in gaps
    table = Table("profile_step", args, device, batch=s.BATCH_SIZE, variant=args.variant, milliseconds_per_step=wall)

    def add(section: str, name: str, milliseconds: float, count: float) -> None:
        table.add(section=section, name=name, milliseconds=milliseconds, share=milliseconds / whole, calls=count)

    for name, time in times.most_common(20):
        add("top", name, time, calls[name])
    kinds = Counter[str]()
    for name, time in times.items():
        kinds[kind_of(name)] += time
    for kind, time in kinds.most_common():
        add("kind", f"**{kind}**", time, sum(count for name, count in calls.items() if kind_of(name) == kind))
    add("kind", "**gaps**", whole - sum(times.values()), 0)
    add("kind", "**the step**", whole, 1)


FLAGS: common.Flags = {
    "batch": dict(type=int, help="images a step (default: 16 on CUDA, else 8)"),
    "steps": dict(type=int, help="steps profiled (default: 20 on CUDA, else 2)"),
    "variant": dict(choices=VARIANTS, default="as train.py", help="of benchmarks.train_step"),
}

if __name__ == "__main__":
    sys.exit(common.main("profile_step", __doc__, measure, FLAGS))
