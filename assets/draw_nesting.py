"""assets/nesting.png: what head 9 finds where earlier tokens were written with 4 heads.

python assets/draw_nesting.py
"""

from pathlib import Path

from matplotlib.figure import Figure

N_H, WIDTH = 12, 0.9
HEADS = [4, 4, 12, 12]  # with which each token was written; the last is the current one
figure = Figure(figsize=(11, 3.6), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=(12, 8))


def cell(axes, x, y, width, text, color, **style):
    axes.barh(y, width, left=x, height=0.7, color=color, edgecolor="black", linewidth=0.6, **style)
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=8)


for y, m in enumerate(HEADS):
    name = f"token {y + 1}, {m} heads" + (" (now)" if y == len(HEADS) - 1 else "")
    for axes in left, right:
        axes.text(-0.3, y, name, ha="right", va="center", fontsize=9)
    for h in range(N_H):
        asked = h == 8
        if h < m:
            cell(left, h, y, WIDTH, "k v", "tab:green" if asked else "#f6c99a")
        else:
            cell(left, h, y, WIDTH, "?" if asked else "", "#ff9896" if asked else "white", ls=":")
    cell(right, 0, y, 5.6, "$c_{KV}$: one latent, for every head", "#98df8a")
    cell(right, 5.7, y, 1.4, "$k_R$", "#98df8a")

for h in range(N_H):
    bold = "bold" if h == 8 else "normal"
    left.text(h + WIDTH / 2, -0.7, h + 1, ha="center", fontsize=9, fontweight=bold)
left.text(-0.3, -0.7, "head", ha="right", fontsize=9)
left.set_title(
    "Nested MHA: head 9 of token 4 finds nothing in the rows of tokens 1 and 2", fontsize=10
)
right.set_title("MatMLA: a row knows no heads, so head 9 reads them all", fontsize=10)
left.set_xlim(-4.2, N_H)
right.set_xlim(-4.6, 7.8)
for axes in left, right:
    axes.set_ylim(len(HEADS) - 0.4, -1.2)
    axes.axis("off")
figure.savefig(Path(__file__).parent / "nesting.png", dpi=130)
