"""
Compare finished runs of train.py: a Markdown table, and figures of their losses.

    python report.py out                       one run: its table; loss.png goes to its folder
    python report.py out/mat.0 out/mat.1 out/mla8 --text FILE --out out/report

Of several runs, report.png (perplexity against the size of the cache), curves.png (losses against steps) and
report.json go to --out. Runs named after their seeds, like mla.0 and mla.1, share a row, with their mean loss.
"""

import json
from pathlib import Path

import numpy as np

from common import Parser, evaluate, load, perplexity, pick_device    # the first of ours: it decides which file is matmla
from data import documents


def read_log(run):
    """The lines of a run's metrics.jsonl, as dicts."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_final(run):
    """The summary of a finished run. ValueError if it has not finished."""
    last = read_log(run)[-1:]
    if not last or "final" not in last[0]:
        raise ValueError(f"{run} has no finished run")
    return last[0]["final"]


def curves(run):
    """The losses of a run's batches, and of the held-out text at each budget: {name: {step: loss}}."""
    lines = read_log(run)
    looks = [x for x in lines if "val_loss" in x]
    found = {"batches": {x["step"]: x["loss"] for x in lines if "loss" in x}}
    return found | {f"held out, {m} heads": {x["step"]: x["val_loss"][m] for x in looks} for m in looks[0]["val_loss"]}


def draw_losses(runs, path):
    """Draw the losses of runs against steps; of several also, beside it, how far the others are behind the first."""
    from matplotlib.figure import Figure                                    # slow to import

    figure = Figure(figsize=(7 if len(runs) == 1 else 14, 4), layout="constrained")
    axes = figure.subplots(1, min(2, len(runs)), squeeze=False)[0]
    found = [curves(run) for run in runs]
    batches, held_out = list(found[0].values())[:2]                         # of the first run, at all its heads
    for run, lines in zip(runs, found):
        for i, (name, losses) in enumerate(lines.items()):
            drawn = len(axes[0].lines)                                    # each thinner, to show where they coincide
            style = dict(color="0.7", linewidth=1)
            if i:
                style = dict(color=f"C{drawn % 7}", linewidth=max(1, 7 / drawn))     # C7 is grey, too
            style["label"] = name if len(runs) == 1 else f"{run.name}: {name}"
            axes[0].plot(losses.keys(), losses.values(), **style)
            if run is not runs[0]:
                first = held_out if i else batches
                shared = sorted(losses.keys() & first.keys())
                axes[1].plot(shared, [losses[step] - first[step] for step in shared], **style)
    for one in axes:
        one.set(xlabel="step", ylabel="loss (nats per token)")
        one.legend()
    if len(runs) > 1:
        axes[1].axhline(0, color="black", linewidth=1)
        axes[1].set_title(f"loss minus that of {runs[0].name}, {list(found[0])[1]}: above 0 is worse")
    figure.savefig(path, dpi=150)


def draw_perplexities(rows, path):
    """Draw the held-out perplexity of every row against the bytes that a token leaves in the cache."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for i, (name, cache_bytes, losses) in enumerate(rows):
        style = dict(marker="o^svDPX*"[i % 8], color=f"C{i}", linestyle="")
        for m, loss in losses.items():
            axes.plot(cache_bytes, perplexity(loss), markersize=4 + 0.5 * int(m), **style)
        axes.plot([], [], label=name, **style)
    axes.set(xlabel="cache, bytes per token (bfloat16)", ylabel="held-out perplexity", xscale="log")
    sizes = sorted({cache_bytes for _, cache_bytes, _ in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.legend(title="larger: more heads", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def text_loss(run, text, device):
    """Mean loss in nats per token of a run on all of another text, at each budget: {m: loss}."""
    model, encoding = load(run / "checkpoint.pt", device)
    tokens = np.concatenate([encoding.encode_ordinary(one) + [encoding.eot_token] for one in documents(text)])
    count = (len(tokens) - 1) // model.config.context
    if count == 0:
        raise ValueError(f"{text} has {len(tokens)} tokens, more than the context of {model.config.context} are needed")
    return evaluate(model, tokens, count)


def report(runs, out, text=None, device=None):
    """Print the table of finished runs, and draw their figures. ValueError for two runs of one name or seed."""
    runs, finals, rows = [run.resolve() for run in runs], {}, {}            # so that `.` too has a name
    for run in runs:
        if run.name in finals:
            raise ValueError(f"two runs are named {run.name}; rename the folder of one")
        final = finals[run.name] = read_final(run)
        if text:
            final |= {"text": str(text), "text_loss": text_loss(run, text, device)}
        name = run.stem if run.suffix == f".{final['seed']}" else run.name
        row = rows.setdefault((name, final["variant"], final["parameters"], final["tokens"], *final["val_loss"]), [])
        if final["seed"] in [one["seed"] for one in row]:
            raise ValueError(f"two runs named {name} have seed {final['seed']}; rename the folder of one")
        row.append(final)
    heads = ["run", "variant", "heads", "parameters", "tokens", "training FLOPs", "seconds", "cache, bytes per token",
             "held-out loss", "perplexity"] + ([f"perplexity of {Path(text).name}"] if text else [])
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    points = []
    for (name, *_), seeds in rows.items():
        final = seeds[0]
        losses = {m: [one["val_loss"][m] for one in seeds] for m in final["val_loss"]}
        points.append((name, final["cache_bytes"], {m: np.mean(some) for m, some in losses.items()}))
        for m, some in losses.items():
            spread = f" ± {np.ptp(some) / 2:.4f}" if len(seeds) > 1 else ""
            cells = [name, final["variant"], m, f"{final['parameters']:,}", f"{final['tokens']:,}",
                     f"{final['flops']:.3g}", f"{final['seconds']:,.0f}", f"{final['cache_bytes']:,}",
                     f"{np.mean(some):.4f}{spread}", f"{perplexity(np.mean(some)):.3f}"]
            if text:
                cells.append(f"{perplexity(np.mean([one['text_loss'][int(m)] for one in seeds])):.3f}")
            print("| " + " | ".join(cells) + " |")
    if len(runs) == 1:
        return draw_losses(runs, runs[0] / "loss.png")
    out.mkdir(parents=True, exist_ok=True)
    draw_perplexities(points, out / "report.png")
    draw_losses(runs, out / "curves.png")
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
