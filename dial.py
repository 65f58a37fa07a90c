"""
The dial of finished runs of train.py: perplexity at every number of heads, and without each head.

    python dial.py out
    python dial.py out/mat out/mla12 out/mla4 --out out/dial

A nested model is read with every number of heads, and with a few vectors, which have a number for
each layer. A model of one number of heads is a point beside it. Then one head after the other is
left out, in all layers at once. All read the same windows of the text that was held out.
dial.png, dial.json, heads.png and heads.json go to --out.

FLOPs are those of a prompt as long as the context, up to the logits of the next token. Of the
scores they count the whole square, T x T, although a token reads only what stands before it.
"""

import copy
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from common import Parser, Table, evaluate, load_run, perplexity, positive
from devices import pick_device
from matmla import GPT
from report import read_runs
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


def prompt_flops(config, heads):
    """FLOPs of a prompt of `context` tokens, as torch counts them, and of one token's logits."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # sizes without data
        GPT(config).hidden(torch.zeros(1, config.context, dtype=torch.long), heads)
    return counter.get_total_flops() + 2 * config.d * config.vocab_size


def measure_dial(model, tokens, count):
    """What `count` windows of the tokens cost and give at every setting: {name: point}."""
    config = model.config
    settings = settings_of(config, model.blocks[0].attention.unit)
    losses = evaluate(model, tokens, count, list(settings.values()))
    return {
        name: {
            "heads": heads,
            "trained": heads in config.budgets,
            "flops": prompt_flops(config, heads),
            "loss": loss,
            "perplexity": perplexity(loss),
        }
        for (name, heads), loss in zip(settings.items(), losses)
    }


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


def draw_dials(dials, path):
    """Perplexity at every number of heads; against FLOPs, enlarged; and of vectors over layers."""
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    whole, costs, vectors = figure.subplots(1, 3)
    for run, dial in dials.items():
        numbers = [point for name, point in dial.items() if "/" not in name]
        trained = [i for i, point in enumerate(numbers) if point["trained"]]
        y = [point["perplexity"] for point in numbers]
        for axes, x in ((whole, "heads"), (costs, "flops")):
            axes.plot([point[x] for point in numbers], y, "o-", markevery=trained, label=run)
        beside = {name: p["perplexity"] for name, p in dial.items() if "/" in name or p["trained"]}
        vectors.plot(beside.keys(), beside.values(), "o")

    whole.set(xlabel="heads (dots: trained)", ylabel="perplexity of held-out text", yscale="log")
    whole.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    costs.set(xlabel="FLOPs of a prompt (all T x T scores)", ylim=vectors.get_ylim())
    vectors.set(xlabel="heads, or heads of every layer")
    vectors.tick_params("x", rotation=90)
    figure.legend(*whole.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)


def draw_heads(runs, path):
    """How much the loss rises without each head, a panel for every run."""
    figure = Figure(figsize=(9, 0.8 + 1.7 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, sharey=True, squeeze=False)[:, 0]
    for axes, (name, run) in zip(panels, runs.items()):
        heads = range(1, len(run["rises"]) + 1)
        axes.bar_label(axes.bar(heads, run["rises"]), fmt="%.3f", fontsize=8)
        axes.set(title=name, xticks=heads)
        axes.margins(y=0.2)  # room for the numbers
    figure.supxlabel("head that is left out")
    figure.supylabel("rise of the loss (nats per token)")
    figure.savefig(path, dpi=150)


def compare(folders, out, count):
    """Measure finished runs, print the table of their dials, draw their figures."""
    device = pick_device("auto")
    runs = read_runs(folders)
    loaded = [load_run(run.folder, device) for run in runs]
    texts = {f"{text} in windows of {model.config.context} tokens" for model, _, text in loaded}
    if len(texts) > 1:
        raise UserError(f"cannot compare runs on different texts: {', '.join(sorted(texts))}")

    out.mkdir(parents=True, exist_ok=True)  # if that is impossible, better now than in an hour
    table = Table()
    dials = {}
    heads = {}
    for run, (model, tokens, _) in zip(runs, loaded):
        if device.type == "cuda":
            model.residual_dtype = torch.bfloat16  # as in training

        dial = measure_dial(model, tokens, count)
        for name, point in dial.items():
            flops = f"{point['flops']:.4g}"
            row = {"run": run.name, "heads": name, "FLOPs of a prompt": flops}
            table.add(row | {"perplexity": point["perplexity"]})
        loss = dial[str(model.config.n_h)]["loss"]
        rises = [without - loss for without in losses_without(model, tokens, count)]
        dials[run.name] = dial
        heads[run.name] = {"loss": loss, "rises": rises}

    draw_dials(dials, out / "dial.png")
    draw_heads(heads, out / "heads.png")
    source = {"text": min(texts), "windows": count}
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
