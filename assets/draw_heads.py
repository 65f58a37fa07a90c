"""assets/heads.png, from heads.json of dial.py: what each head of a MatMLA and of an MLA is worth.

python assets/draw_heads.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
RUNS = {"mat321.0": "MatMLA, trained at 12, 8 and 4 heads", "mla12.0": "MLA, trained at 12 heads"}

figure = Figure(figsize=(9, 3), layout="constrained")
measured = json.loads((HERE / "30m" / "heads.json").read_text())["heads"]
for axes, (run, title) in zip(figure.subplots(1, 2, sharey=True), RUNS.items()):
    rises = measured[run]["rises"]
    bars = axes.bar(range(1, 13), rises, color="tab:green" if "mat" in run else "tab:gray")
    axes.bar_label(bars, [f"{rise:.2f}" for rise in rises], fontsize=8)
    axes.set(title=title, xlabel="head that is left out", xticks=range(1, 13), ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
figure.axes[0].set_ylabel("rise of the loss (nats per token)")
figure.savefig(HERE / "heads.png", dpi=130)
