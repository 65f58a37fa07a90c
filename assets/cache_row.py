"""Draws cache_row.png: what one token leaves in one layer, to scale, at the default sizes.

PYTHONPATH=. python assets/cache_row.py
"""

from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure

from matmla import Config

c = Config()
few = min(c.budgets)
k_and_v = [("k", c.d_h, "tab:blue"), ("v", c.d_h, "tab:orange")]
rows = {
    "MHA, nested MHA full": k_and_v * c.n_h,
    f"nested MHA ragged, {few} heads": k_and_v * few,
    f"GQA, nested GQA, {c.n_kv} groups": k_and_v * c.n_kv,
    "MLA, MatMLA with any heads": [
        ("$c_{KV}$", c.d_c, "tab:green"),
        ("$k_R$", c.d_R, "tab:blue"),
    ],
}

axes = Figure(figsize=(10, 3), layout="constrained").subplots()
for y, parts in enumerate(rows.values()):
    labels, widths, colors = zip(*parts)
    *starts, end = accumulate(widths, initial=0)
    bars = axes.barh([y] * len(parts), widths, left=starts, color=colors, edgecolor="white")
    axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
    axes.text(end, y, f"  {end} numbers", va="center", fontsize=9)
axes.set_yticks(range(len(rows)), rows)
axes.invert_yaxis()
axes.set(xlabel="numbers that one token leaves in one layer", xlim=(0, 2.3 * c.n_h * c.d_h))
axes.spines[["top", "right", "left"]].set_visible(False)
axes.figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
