"""
Compare finished runs of train.py: a Markdown table, and a figure of their losses.

    python report.py out                       curves.png and report.json go to its folder
    python report.py out/mat.0 out/mat.1 out/mla8 --text FILE --out out/report

Runs named after their seeds, like mat.0 and mat.1, share a row. It has the mean of their losses,
± half the distance from the lowest to the highest.
"""

import itertools
import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import Parser, Table, evaluate, load, perplexity
from data import encode
from devices import pick_device
from tokenizer import UserError

# What the summary of a run has at least
NEEDED = "variant", "parameters", "tokens", "flops", "seconds", "cache_bytes", "val_loss", "seed"


@dataclass
class Run:
    """What a finished run left in its folder."""

    folder: Path
    batches: dict  # {step: loss}
    held_out: dict  # {m: {step: loss}}
    final: dict  # the summary

    @property
    def name(self):
        return self.folder.name

    @property
    def row(self):
        """The name of its row: its own, without the seed at its end."""
        named_after_seed = self.folder.suffix == f".{self.final['seed']}"
        return self.folder.stem if named_after_seed else self.name


def read_run(folder):
    """The Run in a folder. UserError if its log is cut, unfinished or of another version."""
    folder = folder.resolve()  # so that . has a name, too
    path = folder / "metrics.jsonl"
    try:
        lines = [dict(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    except (ValueError, TypeError):
        raise UserError(f"{path} is cut or damaged: a line of it is no JSON object") from None
    if not lines or "final" not in lines[-1]:
        raise UserError(f"{path} ends without a summary, so the run is not finished")

    try:
        final = lines[-1]["final"]
        itemgetter(*NEEDED)(final)  # none is missing
        batches = {line["step"]: line["loss"] for line in lines if "loss" in line}
        looks = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        held_out = {m: {step: looks[step][m] for step in looks} for m in final["val_loss"]}
    except (LookupError, TypeError) as error:
        raise UserError(f"{path} was written by another version of train.py: {error}") from None
    return Run(folder, batches, held_out, final)


def read_runs(folders):
    """A list of Runs. UserError if two have one name, by which tables and figures call them."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two runs are named {name}; rename the folder of one")
    return runs


def rows_of(runs):
    """Runs by rows: {name: [Run, ...]}. UserError if those of a row differ not just in the seed."""
    rows = {}
    for run in runs:
        rows.setdefault(run.row, []).append(run)
    for name, row in rows.items():
        finals = [run.final for run in row]
        kinds = {(f["variant"], f["parameters"], f["tokens"], *f["val_loss"]) for f in finals}
        seeds = {f["seed"] for f in finals}
        if len(kinds) > 1 or len(seeds) < len(row):
            names = ", ".join(run.name for run in row)
            raise UserError(
                f"{names} are one row, {name}, but have the same seed or differ in more than that; "
                "rename the folder of one"
            )
    return rows


def text_losses(run, text):
    """Mean loss in nats per token of a run on all of another text, at each budget: {m: loss}."""
    model, encoding = load(run.folder / "checkpoint.pt", pick_device("auto"))
    tokens = np.concatenate([part for _, part in encode(text, encoding)])
    context = model.config.context
    count = (len(tokens) - 1) // context
    if count == 0:
        raise UserError(f"{text} has {len(tokens)} tokens, more than {context} are needed")
    budgets = [int(m) for m in run.final["val_loss"]]
    return dict(zip(run.final["val_loss"], evaluate(model, tokens, count, budgets)))


def print_rows(rows, text):
    """A line for every row and budget. With a text, also the perplexity of its `text_loss`."""
    table = Table()
    for name, runs in rows.items():
        first = runs[0].final
        for m in first["val_loss"]:
            losses = [run.final["val_loss"][m] for run in runs]
            spread = f" ± {np.ptp(losses) / 2:.4f}" if len(runs) > 1 else ""
            cells = {
                "run": name,
                "variant": first["variant"],
                "heads": m,
                "parameters": first["parameters"],
                "tokens": first["tokens"],
                "training FLOPs": f"{first['flops']:.3g}",
                "seconds": round(np.mean([run.final["seconds"] for run in runs])),
                "cache, bytes per token": first["cache_bytes"],
                "held-out loss": f"{np.mean(losses):.4f}{spread}",
                "perplexity": perplexity(np.mean(losses)),
            }
            if text:
                mean = np.mean([run.final["text_loss"][m] for run in runs])
                cells[f"perplexity of {Path(text).name}"] = perplexity(mean)
            table.add(cells)


def draw_losses(runs, path):
    """Losses of runs against steps, and how far they are behind the first run at all its heads."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)

    def draw(losses, first, **style):
        left.plot(losses.keys(), losses.values(), **style)
        behind = {step: losses[step] - first[step] for step in losses if step in first}
        right.plot(behind.keys(), behind.values(), **style)

    first = next(iter(runs[0].held_out.values()))
    for i, run in enumerate(runs):
        draw(run.batches, runs[0].batches, color=f"C{i}", linewidth=0.4)
        label = f"{run.name}: {', '.join(run.held_out)} heads"
        for losses, line in zip(run.held_out.values(), itertools.cycle(("-", "--", ":", "-."))):
            draw(losses, first, color=f"C{i}", linestyle=line, marker=".", label=label)
            label = None

    last = [line.get_ydata()[-1] for line in left.lines]
    left.set(
        xlabel="step (thin: batches; the others: held-out text)",
        ylabel="loss (nats per token)",
        ylim=(min(last) - 0.1, max(last) + 1),
    )
    right.set(xlabel="step", ylabel=f"loss minus that of {runs[0].name} (below 0: better)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)


def report(folders, out, text):
    """Print the table of finished runs, and draw their figure."""
    runs = read_runs(folders)
    rows = rows_of(runs)
    if text:
        for run in runs:
            run.final |= {"text": text, "text_loss": text_losses(run, text)}
    print_rows(rows, text)

    out.mkdir(parents=True, exist_ok=True)
    draw_losses(runs, out / "curves.png")
    finals = {run.name: run.final for run in runs}
    (out / "report.json").write_text(json.dumps(finals, indent=1) + "\n")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    add("--text", help="also their perplexity on this text, a .txt, .jsonl or .parquet file")
    add("--out", type=Path, help="folder of the figure; by default out, or that of a single run")
    args = parser.parse_args()
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path("out"))
    parser.run(report, args.runs, out, args.text)


if __name__ == "__main__":
    main()
