"""The plots of docs/, drawn from the JSON lines of benchmarks/results: `python -m benchmarks.plots`."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
NETWORKS = {  # what the commands in results/spacing.jsonl measured -> its name in the plot
    "docs/shapes.pth": "shapes, cosine, v",
    "checkpoints/demo-linear/best.pth": "shapes, linear, v",
    "checkpoints/large-cosine/best.pth": "Tiny ImageNet, cosine, eps",
    "checkpoints/large-linear/best.pth": "Tiny ImageNet, linear, eps",
}


def rows_of(name: str) -> list[dict[str, Any]]:
    path = Path(__file__).parent / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(figure: Any, name: str) -> None:
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


def spacing() -> None:
    """Error of a drawing against its number of steps, by which steps they are."""
    figure, axes = plt.subplots(1, len(NETWORKS), figsize=(11, 2.8), sharey=True, layout="constrained")
    for axis, (checkpoint, title) in zip(axes, NETWORKS.items()):
        for sampler, colour in {"dpm++": "tab:blue", "ddim": "tab:orange"}.items():
            rows = [row for row in rows_of("spacing") if f" {checkpoint} " in row["command"] and row["sampler"] == sampler]
            for which, style in {"logsnr": "-o", "even": "--o"}.items():
                label = f"{sampler}, even in {'the log-SNR' if which == 'logsnr' else 't'}"
                axis.loglog([row["steps"] for row in rows], [row[which] for row in rows], style, c=colour, ms=3, label=label)
        axis.set(title=title, xlabel="steps", xticks=[5, 10, 20, 50], xticklabels=[5, 10, 20, 50])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("distance to the exact end")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=4)
    save(figure, "spacing")


def decay() -> None:
    """Held-out loss over a run, by what the learning rate does."""
    figure, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
    for row in rows_of("decay"):
        axis.semilogy(*zip(*row["held_out"]), "-o", ms=3, label=row["name"])
    axis.set(xlabel="optimizer step", ylabel="held-out loss")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save(figure, "decay")


if __name__ == "__main__":
    matplotlib.rcParams |= {"font.size": 8, "svg.hashsalt": "ddpm", "svg.fonttype": "none"}
    spacing()
    decay()
