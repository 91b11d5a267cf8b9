"""The plots of docs/, drawn from the JSON lines of benchmarks/results: `python -m benchmarks.plots`."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

NETWORKS = {  # what the commands in results/spacing.jsonl measured -> its name in the plot
    "docs/shapes.pth": "shapes, cosine, v",
    "checkpoints/demo-linear/best.pth": "shapes, linear, v",
    "checkpoints/large-cosine/best.pth": "Tiny ImageNet, cosine, eps",
    "checkpoints/large-linear/best.pth": "Tiny ImageNet, linear, eps",
}


def spacing(rows: list[dict]) -> None:
    """Error of a drawing against its number of steps, by which steps they are."""
    figure, axes = plt.subplots(1, len(NETWORKS), figsize=(11, 2.8), sharey=True, layout="constrained")
    for axis, (checkpoint, title) in zip(axes, NETWORKS.items()):
        for sampler, colour in {"dpm++": "tab:blue", "ddim": "tab:orange"}.items():
            found = [row for row in rows if f" {checkpoint} " in row["command"] and row["sampler"] == sampler]
            for which, style, where in (("logsnr", "-o", "the log-SNR"), ("even", "--o", "t")):
                points = zip(*((row["steps"], row[which]) for row in found))
                axis.loglog(*points, style, c=colour, ms=3, label=f"{sampler}, even in {where}")
        axis.set(title=title, xlabel="steps", xticks=[5, 10, 20, 50], xticklabels=[5, 10, 20, 50])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("distance to the exact end")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=4)


def decay(rows: list[dict]) -> None:
    """Held-out loss over a run, by what the learning rate does."""
    _, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
    for row in rows:
        axis.semilogy(*zip(*row["held_out"]), "-o", ms=3, label=row["name"])
    axis.set(xlabel="optimizer step", ylabel="held-out loss")
    axis.grid(alpha=0.3, which="both")
    axis.legend()


def equal_time(rows: list[dict]) -> None:
    """Distance of what each program draws to the training pictures, by sampler."""
    rows.sort(key=lambda row: row["frechet, own sampler"])
    _, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
    for shift, way in ((0.2, "dpm++"), (-0.2, "own sampler")):
        axis.barh([shift - i for i in range(len(rows))], [row[f"frechet, {way}"] for row in rows], 0.4, label=way)
    axis.axvline(rows[0]["frechet, real validation pictures"], c="grey", ls=":", label="real validation pictures")
    axis.set(yticks=range(0, -len(rows), -1), yticklabels=[row["name"] for row in rows], xlabel="Frechet distance")
    axis.legend()


if __name__ == "__main__":
    matplotlib.rcParams |= {"font.size": 8, "svg.hashsalt": "ddpm", "svg.fonttype": "none"}
    for plot, figures in {spacing: "logsnr", decay: "held_out", equal_time: "frechet, dpm++"}.items():
        path = Path("benchmarks/results", f"{plot.__name__}.jsonl")
        lines = [line for line in path.read_text().splitlines() if f'"{figures}"' in line]  # not those of an older script
        plot([json.loads(line) for line in lines])
        plt.savefig(Path("docs", f"{plot.__name__}.svg"), metadata={"Date": None})
