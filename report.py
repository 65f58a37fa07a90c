"""
Compare finished runs of train.py: a Markdown table, and a figure of their losses.

    python report.py out                       one run: curves.png and report.json go to its folder
    python report.py out/mat.0 out/mat.1 out/mla8 --text FILE --out out/report

Runs named after their seeds, like mat.0 and mat.1, share a row, with their mean loss.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import Parser, evaluate, load, perplexity, pick_device, print_row  # first of ours
from data import encode


def read_log(run):
    """The lines of a run's metrics.jsonl, as dicts. ValueError if the last is not the summary of a finished run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not lines or "final" not in lines[-1]:
        raise ValueError(f"{run} has no finished run")
    return lines


def draw_losses(runs, path):
    """Draw the losses of runs against steps, and how far they are behind those of the first run at all its heads."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    firsts = {}  # losses of the first run: batches, held out
    for run in runs:
        lines = {"batches": {}}  # {name: {step: loss}}
        for entry in read_log(run):
            if "loss" in entry:
                lines["batches"][entry["step"]] = entry["loss"]
            for m, loss in entry.get("val_loss", {}).items():
                lines.setdefault(f"held out, {m} heads", {})[entry["step"]] = loss
        for name, losses in lines.items():
            style = {"linewidth": 0.5} if name == "batches" else {"marker": "."}
            left.plot(losses.keys(), losses.values(), label=f"{run.name}: {name}", **style)
            first = firsts.setdefault(name == "batches", losses)
            behind = {step: losses[step] - first[step] for step in losses if step in first}
            right.plot(behind.keys(), behind.values(), **style)
    final = [line.get_ydata()[-1] for line in left.lines]
    left.set(xlabel="step", ylabel="loss (nats per token)", ylim=(min(final) - 0.1, max(final) + 1))
    right.set(xlabel="step", ylabel=f"loss minus that of {runs[0].name} (below 0: better)")
    figure.legend(handles=left.lines, loc="outside right upper")
    figure.savefig(path, dpi=150)


def text_loss(run, text):
    """Mean loss in nats per token of a run on all of another text, at each budget: {m: loss}."""
    model, encoding = load(run / "checkpoint.pt", pick_device("auto"))
    tokens = np.concatenate([part for _, part in encode(text, encoding)])
    count = (len(tokens) - 1) // model.config.context
    if count == 0:
        raise ValueError(
            f"{text} has {len(tokens)} tokens, more than the context of {model.config.context} are needed"
        )
    return evaluate(model, tokens, count)


def report(runs, out, text=None):
    """Print the table of finished runs, and draw their figure. ValueError for two runs of one name or seed."""
    runs, finals, rows = [run.resolve() for run in runs], {}, {}  # resolved, `.` too has a name
    for run in runs:
        if run.name in finals:
            raise ValueError(f"two runs are named {run.name}; rename the folder of one")
        final = finals[run.name] = read_log(run)[-1]["final"]
        if text:
            final |= {"text": str(text), "text_loss": text_loss(run, text)}
        name = run.stem if run.suffix == f".{final['seed']}" else run.name
        row = rows.setdefault(
            (name, final["variant"], final["parameters"], final["tokens"], *final["val_loss"]), {}
        )
        if final["seed"] in row:
            raise ValueError(
                f"two runs named {name} have seed {final['seed']}; rename the folder of one"
            )
        row[final["seed"]] = final
    for (name, variant, parameters, tokens, *budgets), row in rows.items():
        one = next(iter(row.values()))
        for m in budgets:
            losses = [final["val_loss"][m] for final in row.values()]
            cells = {
                "run": name,
                "variant": variant,
                "heads": m,
                "parameters": parameters,
                "tokens": tokens,
                "training FLOPs": f"{one['flops']:.3g}",
                "seconds": round(one["seconds"]),
                "cache, bytes per token": one["cache_bytes"],
                "held-out loss": f"{np.mean(losses):.4f}"
                + f" ± {np.ptp(losses) / 2:.4f}" * (len(row) > 1),
                "perplexity": perplexity(np.mean(losses)),
            }
            if text:
                mean = np.mean([final["text_loss"][int(m)] for final in row.values()])
                cells[f"perplexity of {Path(text).name}"] = perplexity(mean)
            print_row(cells, head=one is finals[runs[0].name] and m == budgets[0])
    out = out if len(runs) > 1 else runs[0]
    out.mkdir(parents=True, exist_ok=True)
    draw_losses(runs, out / "curves.png")
    (out / "report.json").write_text(json.dumps(finals, indent=1) + "\n")


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run"
    )
    parser.add_argument(
        "--text", help="also their perplexity on this text, a .txt, .jsonl or .parquet file"
    )
    parser.add_argument(
        "--out", default=Path("out"), type=Path, help="folder for what several runs are drawn in"
    )
    args = parser.parse_args()
    parser.attempt(report, args.runs, args.out, args.text)


if __name__ == "__main__":
    main()
