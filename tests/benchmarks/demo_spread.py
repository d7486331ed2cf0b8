"""The demo over seeds and precisions, in one picture: mean and range of each curve.

    for precision in 32-true bf16-mixed; do for seed in 0 1 2; do
      mir-lightning pretrain fit --config demo --trainer.precision=$precision --seed_everything=$seed \
        --data.seed=$seed --trainer.default_root_dir=runs/spread/$precision-$seed
    done; done
    python -m tests.benchmarks.demo_spread runs/spread docs/images/demo_curves.png
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from mir_lightning.report import read_run

PANELS = {
    "MIR (lower: better aligned)": "mir",
    "MIR by the robust rule": "mir_robust",
    "held-out loss (nats a token)": "mir_probe/loss",
    "effective rank of vision tokens": "mir_rank/vision",
}
STYLES = {"32-true": ("float32", "#0072B2", "o-"), "bf16-mixed": ("bfloat16", "#E69F00", "s--")}


def main(folder, picture):
    figure = Figure(figsize=(12, 3), dpi=120, layout="constrained")
    for axes, (label, name) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for precision, (title, colour, style) in STYLES.items():
            curves = [dict(read_run(run).curves[name]) for run in sorted(folder.glob(f"{precision}-*"))]
            steps = sorted(curves[0])
            values = [[curve[step] for curve in curves] for step in steps]
            axes.plot(steps, [sum(v) / len(v) for v in values], style, color=colour, markersize=4, label=title)
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2)
            print(title, name, [f"{min(v):.3f}..{max(v):.3f}" for v in values])
        axes.set(xlabel="optimizer step", title=label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].sharey(figure.axes[0])
    figure.axes[0].legend(frameon=False, title="mean and range, 3 seeds")
    figure.savefig(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
