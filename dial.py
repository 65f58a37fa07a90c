"""
The dial of finished runs of train.py: perplexity at every number of heads, and without each head.

    python dial.py out
    python dial.py out/mat.0 out/mat.1 out/mla12 out/mla4 --out out/dial

A nested model is read with every number of heads, and with a few vectors, which have a number for
each layer. A model of one number of heads is a point beside it. Then one head after the other is
left out, in all layers at once. All read the same windows of the text that was held out.
dial.png, dial.json, heads.png and heads.json go to --out. Runs share rows as in report.py.

FLOPs are those of a prompt as long as the context, up to the logits of the next token. Of the
scores they count the whole square, T x T, although a token reads only what stands before it.
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MultipleLocator
from torch.utils.flop_counter import FlopCounterMode

from common import Parser, Table, evaluate, load, load_checkpoint, positive
from data import prepare, read_tokens
from devices import pick_device
from matmla import Block
from report import read_rows
from tokenizer import UserError


def settings_of(config, unit):
    """What the dial can be set to, {name: heads}: every multiple of `unit` heads, then vectors.

    With budgets 12, 8 and 4 these are 12/4/12/4…, layers in turn; 4…/12…, the first half of the
    layers at 4 and the rest at 12; 12…/4…; all budgets, 12…/8…/4…; and 4…/8…/12….
    """
    n, budgets = config.n_layer, config.budgets
    settings = {str(m): m for m in range(unit, config.n_h + 1, unit)}
    if n > 1 and len(budgets) > 1:
        many, few = max(budgets), min(budgets)
        half = [few if layer < n // 2 else many for layer in range(n)]
        falling = [budgets[layer * len(budgets) // n] for layer in range(n)]
        settings[f"{many}/{few}/{many}/{few}…"] = [(many, few)[layer % 2] for layer in range(n)]
        for vector in half, half[::-1], falling, falling[::-1]:
            settings["…/".join(map(str, dict.fromkeys(vector))) + "…"] = vector
    return settings


def prompt_flops(config, settings):
    """FLOPs of a prompt of `context` tokens at each of the settings: a list."""
    vectors = [heads if isinstance(heads, list) else [heads] * config.n_layer for heads in settings]
    with torch.device("meta"):  # sizes without data
        layer = Block(config)
        x = torch.zeros(1, config.context, config.d)
    flops = {}  # of a layer at m heads, as torch counts them
    for m in set().union(*vectors):
        with FlopCounterMode(display=False) as counter:
            layer(x, m)
        flops[m] = counter.get_total_flops()
    logits = 2 * config.d * config.vocab_size
    return [sum(flops[m] for m in vector) + logits for vector in vectors]


@torch.no_grad()
def losses_without(model, tokens, count):
    """The losses without head 1, without head 2, ...: its columns of W_O are 0 in all layers."""
    d_h = model.config.d_h
    losses = []
    for head in range(model.config.n_h):
        rest = copy.deepcopy(model)
        for block in rest.blocks:
            block.attention.W_O.weight[:, head * d_h : (head + 1) * d_h] = 0
        losses += evaluate(rest, tokens, count, [None])
    return losses


def measure(run, count, device):
    """What is drawn of a run, from `count` windows of its held-out text: a dict."""
    path = run.folder / "checkpoint.pt"
    saved = load_checkpoint(path, device)
    model, _ = load(path, device, saved)
    if device.type == "cuda":
        model.residual_dtype = torch.bfloat16  # as in training
    config = model.config
    source = saved["settings"]
    text = prepare(source["data"], saved["encoding"], source["tokens"], config.vocab_size)
    _, tokens = read_tokens(text, config.context, config.vocab_size)

    settings = settings_of(config, model.blocks[0].attention.unit)
    losses = evaluate(model, tokens, count, list(settings.values()))
    flops = prompt_flops(config, settings.values())
    loss = losses[list(settings).index(str(config.n_h))]
    rises = [without - loss for without in losses_without(model, tokens, count)]
    dial = {
        name: {
            "heads": heads,
            "trained": heads in config.budgets,
            "flops": cost,
            "loss": loss,
        }
        for (name, heads), cost, loss in zip(settings.items(), flops, losses)
    }
    return {
        "text": f"{text} in windows of {config.context} tokens",
        "dial": dial,
        "loss": loss,
        "rises": rises,
    }


def mean_of(dials):
    """The dial of a row: the perplexity of its runs' mean loss, and of the lowest and highest."""
    mean = {}
    for name, point in dials[0].items():
        losses = [dial[name]["loss"] for dial in dials]
        low, middle, high = np.exp((min(losses), np.mean(losses), max(losses))).tolist()
        mean[name] = point | {"loss": losses, "perplexity": middle, "lowest": low, "highest": high}
    return mean


def print_tables(dials, runs):
    """Perplexities, by settings and what they cost; and how the loss rises without each head."""
    lines = {}
    for row, dial in dials.items():
        for name, point in dial.items():
            start = {"heads": name, "FLOPs of a prompt": f"{point['flops']:.4g}"}
            line = lines.setdefault(
                ("/" in name, point["flops"], name), start | dict.fromkeys(dials)
            )
            line[row] = point["perplexity"]
    table = Table()
    for _, line in sorted(lines.items()):
        table.add(line)

    table = Table()
    for head in range(max(len(run["rises"]) for run in runs.values())):
        rises = {name: dict(enumerate(run["rises"])).get(head) for name, run in runs.items()}
        table.add({"loss without head": head + 1} | rises)


def plot(axes, x, points, **style):
    """Perplexities of a row's dial, with bars from the lowest to the highest of its runs."""
    y, low, high = ([point[key] for point in points] for key in ("perplexity", "lowest", "highest"))
    bars = np.subtract(y, low), np.subtract(high, y)
    axes.errorbar(x, y, bars, elinewidth=1, capsize=2, **style)


def draw_dials(dials, path):
    """Perplexity at every number of heads; against FLOPs, enlarged; and of vectors over layers."""
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    whole, costs, vectors = figure.subplots(1, 3)
    nested_first = sorted(dials.items(), key=lambda item: len(item[1]), reverse=True)
    for i, (row, dial) in enumerate(nested_first):
        color = f"C{i}"
        numbers = [point for name, point in dial.items() if "/" not in name]
        trained = [point for point in numbers if point["trained"]]
        for axes, x in ((whole, "heads"), (costs, "flops")):
            plot(axes, [point[x] for point in numbers], numbers, fmt=".-", color=color, label=row)
            plot(axes, [point[x] for point in trained], trained, fmt="o", color=color)
        named = {name: p for name, p in dial.items() if "/" in name or p["trained"]}
        plot(vectors, list(named), named.values(), fmt="o", color=color)

    whole.set(xlabel="heads (large: trained)", ylabel="perplexity of held-out text", yscale="log")
    whole.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    costs.set(xlabel="FLOPs of a prompt (all T x T scores)", ylim=vectors.get_ylim())
    costs.xaxis.set_major_formatter(EngFormatter())
    vectors.set(xlabel="heads, or heads of every layer")
    vectors.tick_params("x", rotation=90)
    figure.legend(*whole.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)


def draw_heads(runs, path):
    """How much the loss rises without each head, a panel for every run; lines end its budgets."""
    figure = Figure(figsize=(9, 0.8 + 1.7 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, run) in zip(panels, runs.items()):
        heads = range(1, len(run["rises"]) + 1)
        axes.bar_label(axes.bar(heads, run["rises"]), fmt="%.3f", fontsize=8)
        axes.set_title(name)
        axes.margins(y=0.2)
        for point in run["dial"].values():
            if point["trained"] and point["heads"] < len(heads):
                axes.axvline(point["heads"] + 0.5, color="grey", linestyle=":")
    axes.xaxis.set_major_locator(MultipleLocator(1))
    figure.supxlabel("head that is left out")
    figure.supylabel("rise of the loss (nats per token)")
    figure.savefig(path, dpi=150)


def compare(folders, out, count):
    """Measure finished runs, print their tables, draw their figures."""
    rows = read_rows(folders)
    device = pick_device("auto")
    runs = {run.name: measure(run, count, device) for row in rows.values() for run in row}
    texts = {run["text"] for run in runs.values()}
    if len(texts) > 1:
        raise UserError(f"cannot compare runs on different texts: {', '.join(sorted(texts))}")
    dials = {name: mean_of([runs[run.name]["dial"] for run in row]) for name, row in rows.items()}
    print_tables(dials, runs)

    out.mkdir(parents=True, exist_ok=True)
    draw_dials(dials, out / "dial.png")
    draw_heads(runs, out / "heads.png")
    source = {"text": min(texts), "windows": count}
    heads = {name: {"loss": run["loss"], "rises": run["rises"]} for name, run in runs.items()}
    for name, content in (("dial", dials), ("heads", heads)):
        text = json.dumps(source | {name: content}, indent=1)
        (out / f"{name}.json").write_text(text + "\n")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    add("--windows", default=128, type=positive, help="how many windows of held-out text")
    add("--out", default=Path("out"), type=Path, help="folder of the figures")
    args = parser.parse_args()
    parser.run(compare, args.runs, args.out, args.windows)


if __name__ == "__main__":
    main()
