"""
Compare finished runs of train.py: a Markdown table, and figures of their losses.

    python report.py out                       one run: its table; curves.png goes to its folder
    python report.py out/mat.0 out/mat.1 out/mla8 --text FILE --out out/report

Of several runs, curves.png (losses against steps), report.png (perplexity against the size of the cache) and
report.json go to --out. Runs named after their seeds, like mla.0 and mla.1, share a row, with their mean loss.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import Parser, evaluate, load, perplexity, pick_device, print_row    # first of ours
from data import encode


def read_log(run):
    """The lines of a run's metrics.jsonl, as dicts. ValueError if the last is not the summary of a finished run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not lines or "final" not in lines[-1]:
        raise ValueError(f"{run} has no finished run")
    return lines


def curves(run):
    """The losses of a run's batches, and of the held-out text at each budget: {name: {step: loss}}."""
    found = {"batches": {}}
    for line in read_log(run):
        if "loss" in line:
            found["batches"][line["step"]] = line["loss"]
        for m, loss in line.get("val_loss", {}).items():
            found.setdefault(f"held out, {m} heads", {})[line["step"]] = loss
    return found


def draw_losses(runs, path):
    """Draw the losses of runs against steps, and how far they are behind those of the first run at all its heads."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = [curves(run) for run in runs]
    batches, held_out = list(found[0].values())[:2]
    for run, lines in zip(runs, found):
        for name, losses in lines.items():
            first, style = (batches, {"linewidth": 0.5}) if name == "batches" else (held_out, {"marker": "."})
            left.plot(losses.keys(), losses.values(), label=f"{run.name}: {name}", **style)
            behind = {step: losses[step] - first[step] for step in losses if step in first}
            right.plot(behind.keys(), behind.values(), **style)
    final = [line.get_ydata()[-1] for line in left.lines]
    left.set(xlabel="step", ylabel="loss (nats per token)", ylim=(min(final) - 0.1, max(final) + 1))
    right.set(xlabel="step", ylabel=f"loss minus that of {runs[0].name} (below 0: better)")
    figure.legend(handles=left.lines, loc="outside right upper")
    figure.savefig(path, dpi=150)


def draw_perplexities(rows, path):
    """Draw the held-out perplexity of rows (name, cache bytes per token, {m: loss}) against the bytes."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, sizes = figure.subplots(), sorted({size for _, size, _ in rows})
    for i, (name, size, losses) in enumerate(rows):
        style = dict(marker="o^svDPX*"[i % 8], color=f"C{i}", linestyle="")
        for m, loss in losses.items():
            axes.plot(size, perplexity(loss), markersize=4 + 0.5 * int(m), **style)
        axes.plot([], [], label=name, **style)
    axes.set(xlabel="cache, bytes per token (bfloat16)", ylabel="held-out perplexity", xscale="log")
    axes.set(xlim=(sizes[0] / 2, sizes[-1] * 2), xticks=sizes, xticklabels=[f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    figure.legend(title="larger: more heads", loc="outside right upper")
    figure.savefig(path, dpi=150)


def text_loss(run, text, device):
    """Mean loss in nats per token of a run on all of another text, at each budget: {m: loss}."""
    model, encoding = load(run / "checkpoint.pt", device)
    tokens = np.concatenate([part for _, part in encode(text, encoding)])
    count = (len(tokens) - 1) // model.config.context
    if count == 0:
        raise ValueError(f"{text} has {len(tokens)} tokens, more than the context of {model.config.context} are needed")
    return evaluate(model, tokens, count)


def report(runs, out, text=None, device=None):
    """Print the table of finished runs, and draw their figures. ValueError for two runs of one name or seed."""
    runs, finals, rows, points = [run.resolve() for run in runs], {}, {}, []    # resolved, `.` too has a name
    for run in runs:
        if run.name in finals:
            raise ValueError(f"two runs are named {run.name}; rename the folder of one")
        final = finals[run.name] = read_log(run)[-1]["final"]
        if text:
            final |= {"text": str(text), "text_loss": text_loss(run, text, device)}
        name = run.stem if run.suffix == f".{final['seed']}" else run.name
        row = rows.setdefault((name, final["variant"], final["parameters"], final["tokens"], *final["val_loss"]), {})
        if final["seed"] in row:
            raise ValueError(f"two runs named {name} have seed {final['seed']}; rename the folder of one")
        row[final["seed"]] = final
    for (name, variant, parameters, tokens, *budgets), row in rows.items():
        one, means = next(iter(row.values())), {}
        for m in budgets:
            losses = [final["val_loss"][m] for final in row.values()]
            means[m] = np.mean(losses)
            cells = {"run": name, "variant": variant, "heads": m, "parameters": parameters, "tokens": tokens,
                     "training FLOPs": f"{one['flops']:.3g}", "seconds": round(one["seconds"]),
                     "cache, bytes per token": one["cache_bytes"],
                     "held-out loss": f"{means[m]:.4f}" + f" ± {np.ptp(losses) / 2:.4f}" * (len(row) > 1),
                     "perplexity": perplexity(means[m])}
            if text:
                mean = np.mean([final["text_loss"][int(m)] for final in row.values()])
                cells[f"perplexity of {Path(text).name}"] = perplexity(mean)
            print_row(cells, head=not points and m == budgets[0])
        points.append((name, one["cache_bytes"], means))
    if len(runs) == 1:
        return draw_losses(runs, runs[0] / "curves.png")
    out.mkdir(parents=True, exist_ok=True)
    draw_losses(runs, out / "curves.png")
    draw_perplexities(points, out / "report.png")
    (out / "report.json").write_text(json.dumps(finals, indent=1) + "\n")


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--text", help="also their perplexity on this text, a .txt, .jsonl or .parquet file")
    parser.add_argument("--out", default=Path("out"), type=Path, help="folder for what several runs are drawn in")
    parser.add_argument("--device", default="auto", help="for --text: cuda, mps or cpu; auto takes the first there")
    args = parser.parse_args()
    parser.attempt(lambda: report(args.runs, args.out, args.text, pick_device(args.device)))


if __name__ == "__main__":
    main()
