"""
What a token costs in the cache of every variant, by the formula and in real tensors; then how fast they decode.

    python bench_cache.py                          the sizes train.py trains by default
    python bench_cache.py --preset paper           209M parameters, the MatMLA paper's scale; speed on a GPU only
    python bench_cache.py --preset deepseek-v3     published models, sizes only
    python bench_cache.py --switch out             a trained model's perplexity when the budget changes after a prefix

The last line of output is the same as one JSON object. Figures go to --out: cache_row.png, what a token leaves, to
scale, and bench_cache.png, size and speed against context, of the first two; switch.png of the last.
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import Parser, load, load_checkpoint, make_config, perplexity, pick_device    # the first of ours
from data import prepare, read_tokens, windows
from decode import attend_one, fast, record
from matmla import ATTENTION, GPT, Config
from train import PRESETS

PUBLISHED = {    # sizes from the models' own config files; DeepSeek's hardware paper (arXiv:2505.09343) compares them
    "DeepSeek-V3": Config("mla", n_layer=61, d=7168, n_h=128, d_h=128, d_c=512, d_cq=1536, d_R=64, budgets=(128,)),
    "Qwen2.5-72B": Config("gqa", n_layer=80, d=8192, n_h=64, n_kv=8, d_h=128, budgets=(64,)),
    "LLaMA-3.1-405B": Config("gqa", n_layer=126, d=16384, n_h=128, n_kv=8, d_h=128, budgets=(128,)),
}
SHAPES = {    # batch, tokens in the cache
    "cpu": [(1, 256), (1, 1024), (8, 1024)],
    "cuda": [(1, 1024), (1, 16384), (16, 1024), (16, 4096), (16, 16384), (64, 8192)],
}


def print_row(*cells, head=False):
    """A row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |" + ("\n" + "|---" * len(cells) + "|") * head, flush=True)


def formula(c, m):
    """Numbers one token leaves in one layer, as the papers count them; m heads are kept by ragged nested MHA."""
    heads = {"mha": c.n_h, "nested_mha": m, "gqa": c.n_kv}
    return 2 * heads[c.attention] * c.d_h if c.attention in heads else c.d_c + c.d_R


def measure(config, heads, device):
    """Bytes one token takes in the bfloat16 tensors of a real cache."""
    with torch.device("meta"):                                      # the weights are not needed,
        model = GPT(dataclasses.replace(config, vocab_size=1, d_ff=1))
    model.embed.to_empty(device=device).bfloat16()                  # only where and what they would be
    cache = model.new_cache(1, 64, heads)
    assert cache.nbytes == cache[0].rows.untyped_storage().nbytes()    # of all layers
    return cache.nbytes // 64


def sizes(name, config, device):
    """One dict per budget whose cache differs."""
    rows = []
    for m in config.budgets if ATTENTION[config.attention].nested else (config.n_h,):
        layout = {"nested_mha": "full, any budget" if m == config.n_h else f"ragged, at most {m} heads",
                  "matmla": f"any budget of {', '.join(map(str, config.budgets))}"}.get(config.attention, "")
        row = dict(variant=name, layout=layout, numbers=formula(config, m),
                   formula=formula(config, m) * config.n_layer * 2, measured=measure(config, m, device))
        assert row["formula"] == row["measured"], f"formula and measurement differ: {row}"
        if row not in rows:                                         # MatMLA has one cache for all budgets
            rows.append(row)
    return rows


def print_sizes(rows):
    print_row("variant", "cache", "numbers per token and layer", "bytes per token, formula", "measured",
              "share of the first", "tokens per GiB", head=True)
    for r in rows:
        print_row(r["variant"], r["layout"], *(f"{r[key]:,}" for key in ("numbers", "formula", "measured")),
                  f"{r['measured'] / rows[0]['measured']:.0%}", f"{2**30 // r['measured']:,}")


# ---------------------------------------------------------------- speed


def seconds(call, device, n=10):
    """Of one call: the best of n on a CPU, n in a row on a GPU, which works behind the host's back."""
    call(), call()
    if device.type == "cpu":
        times = [time.perf_counter()]
        for _ in range(n):
            call()
            times.append(time.perf_counter())
        return min(np.diff(times))
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(n):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / n


def copy_bandwidth(device):
    """Bytes per second, read and written, of a large copy: what memory can do."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds(lambda: y.copy_(x), device)


def attend_all(q, k, v, positions, scale):
    """`attend_one` for a full cache. Without rows to leave out, SDPA may take its fastest kernel where every head has
    its own keys: so MHA is measured at its best, better than a growing cache allows."""
    if q.shape[2] > k.shape[2]:
        return attend_one(q, k, v, positions, scale)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


@torch.no_grad()
def step_seconds(config, reader, m, batch, length, new, device):
    """Seconds until the last of `length` tokens has its successor, where all but the `new` last are in the cache."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config)
    model = model.bfloat16() if device.type == "cuda" else model    # random weights, in the dtype it would run in there
    for block in model.blocks if reader == "naive" else []:
        block.attention.short = 0
    if device.type == "cuda":
        fast(model, attend_all if config.attention in ("mha", "nested_mha") else attend_one)
    cache, tokens = model.new_cache(batch, length), torch.zeros(batch, new, dtype=torch.long, device=device)
    for layer in cache:
        layer.rows.normal_()

    def step():
        for layer in cache:
            layer.length = length - new
        return model.step(tokens, m, cache).argmax(-1)

    return seconds(step, device)


@torch.no_grad()
def attention_read(c, batch, length, device):
    """Seconds one layer of a GPU takes to read the cache: softmax(qᵀk)v alone, without any projection."""
    latent = c.attention in ("mla", "matmla")
    n_kv, width = (1, c.d_c + c.d_R) if latent else (c.n_kv if c.attention == "gqa" else c.n_h, c.d_h)
    rows = torch.randn(batch, length, n_kv, width if latent else 2 * width, device=device, dtype=torch.bfloat16)
    k, v = (rows, rows) if latent else rows.chunk(2, -1)
    q = torch.randn(batch, 1, c.n_h, width, device=device, dtype=torch.bfloat16)
    read, position = torch.compile(attend_all, dynamic=False), torch.tensor([length - 1], device=device)
    graph, _ = record(lambda: read(q, k, v, position, 0.1), device)
    return seconds(graph.replay, device, n=20)


def speeds(config, shapes, device):
    """Decode and prefill with every variant: one dict per shape, variant, reader and budget, printed as it comes."""
    gpu, copied, rows, large = device.type == "cuda", copy_bandwidth(device), [], config.budgets[:1]
    readers = (("mha", "", large), ("gqa", "", large), ("nested_mha", "full", config.budgets[-1:]),
               ("matmla", "naive", large), ("matmla", "absorbed", config.budgets))
    print(f"\nDecoding one token of every sequence; GB/s: the cache over the time, beside a copy's {copied / 1e9:,.0f}")
    print_row("batch", "cached", "variant", "heads", "step, µs", "tokens/s", "GB/s", "of copy", "attention read, µs",
              "prefill, ms", "step / MHA's", "prefill / MHA's", head=True)
    for (batch, length), (name, reader, budgets) in itertools.product(shapes, readers):
        c = dataclasses.replace(config, attention=name, context=length)
        for m in budgets:
            step = step_seconds(c, reader, m, batch, length, 1, device)
            read = formula(c, m) * c.n_layer * (2 if gpu else 4) * batch * length
            row = dict(batch=batch, length=length, variant=name, reader=reader, heads=m, step=step,
                       tokens_per_second=batch / step, cache_bytes=read, bandwidth=read / step, copy_bandwidth=copied)
            if name == "mha":                                       # the first of every shape
                mha = row
            row["to_mha"] = step / mha["step"]
            if batch * length <= 2**16 and reader != "naive":
                row["prefill"] = step_seconds(c, reader, m, batch, length, length, device)
            if gpu and m == c.n_h and reader != "naive":
                row["attention_read"] = attention_read(c, batch, length, device)
            rows.append(row)
            torch.compiler.reset()
            fill, alone = row.get("prefill"), row.get("attention_read")
            print_row(batch, f"{length:,}", f"{name} {reader}".strip(), m, f"{step * 1e6:,.0f}", f"{batch / step:,.0f}",
                      f"{read / step / 1e9:,.0f}", f"{read / step / copied:.0%}", f"{alone * 1e6:.1f}" if alone else "",
                      f"{fill * 1e3:.2f}" if fill else "", f"{row['to_mha']:.2f}",
                      f"{fill / mha['prefill']:.2f}" if fill else "")
    return rows


# ---------------------------------------------------------------- figures


def new_figure(width, height, columns=1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_rows(c, path):
    """What one token leaves in one layer, to scale: one unit of width is one number."""
    figure, (axes,) = new_figure(10, 3)
    pairs = [("k", c.d_h, "tab:blue"), ("v", c.d_h, "tab:orange")]
    latent = [("$c_{KV}$", c.d_c, "tab:green"), ("$k_R$", c.d_R, "tab:blue")]
    small = min(c.budgets)
    rows = {"MHA, nested MHA full": pairs * c.n_h, f"nested MHA ragged, {small} heads": pairs * small,
            f"GQA, {c.n_kv} groups": pairs * c.n_kv, "MLA, MatMLA at every budget": latent}
    for y, parts in enumerate(rows.values()):
        x = 0
        for label, width, color in parts:
            axes.barh(y, width, left=x, color=color, edgecolor="white", height=0.7)
            axes.text(x + width / 2, y, label, ha="center", va="center", color="white", fontsize=8)
            x += width
        axes.text(x, y, f"  {x} numbers", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(xlabel="numbers that one token leaves in one layer of the cache", xlim=(0, 2.3 * c.n_h * c.d_h))
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw(size_rows, speed_rows, path):
    """Cache size and, if it was measured, decoding speed against context."""
    figure, (left, *right) = new_figure(10 if speed_rows else 5, 4, 2 if speed_rows else 1)
    lengths = 2 ** np.arange(8, 18)
    for i, r in enumerate(size_rows):                               # each thinner, to show where they coincide
        label = f"{r['variant']} {r['layout']}".strip()
        left.plot(lengths, r["measured"] * lengths / 2**20, linewidth=8 - i, label=label)
    left.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="MiB per sequence, bfloat16")
    for axes in right:
        batch = 16 if any(r["batch"] == 16 for r in speed_rows) else 1
        lines = {}
        for r in speed_rows:
            if r["batch"] == batch:
                label = f"{r['variant']} {r['reader']}".strip() + f", {r['heads']} heads"
                lines.setdefault(label, {})[r["length"]] = r["tokens_per_second"]
        for label, line in lines.items():
            axes.plot(line.keys(), line.values(), "o-", label=label)
        axes.set(xscale="log", xlabel="tokens in the cache", ylabel=f"tokens per second, batch {batch}", ylim=(0, None))
    for axes in (left, *right):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def draw_switching(tables, path):
    """A panel per run of {run: {a: {b: perplexity}}}: how many percent a prefix changes that b did not write itself."""
    figure, panels = new_figure(1 + 3 * len(tables), 3.2, len(tables))
    for axes, (run, table) in zip(panels, tables.items()):
        change = [[100 * (x / table[b][b] - 1) for b, x in row.items()] for row in table.values()]
        axes.imshow(change, cmap="RdBu_r", vmin=-1, vmax=1)
        for y, (row, perplexities) in enumerate(zip(change, table.values())):
            for x, (percent, value) in enumerate(zip(row, perplexities.values())):
                axes.text(x, y, f"{value:.2f}\n{round(percent, 2) + 0:+}%", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(table)), table)
        axes.set_yticks(range(len(table)), table)
        axes.set(xlabel="heads that read (%: beside its own prefix)", ylabel="heads that wrote the prefix", title=run)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- the budget changes on the way


@torch.no_grad()
def switching(run, device, count=128):
    """(variant, {a: {b: perplexity}}) of a run: of held-out text at budget b after a prefix that budget a wrote.

    The prefix is half a context long. ValueError for a run that has no held-out text, or one budget only.
    """
    saved = load_checkpoint(run / "checkpoint.pt", device)
    model, _ = load(run / "checkpoint.pt", device, saved)
    c, settings, half = model.config, saved["settings"], model.config.context // 2
    if "data" not in settings:
        raise ValueError(f"{run} was not trained by train.py, so it has no held-out text")
    if not ATTENTION[c.attention].nested:
        raise ValueError(f"{run} is {c.attention}, which has one budget only")
    folder = prepare(settings["data"], saved["encoding"], settings["tokens"])
    _, tokens = read_tokens(folder, c.context, c.vocab_size)
    starts = np.linspace(0, len(tokens) - c.context - 1, count).astype(int)
    losses = {a: dict.fromkeys(c.budgets, 0.0) for a in c.budgets}
    for part in np.array_split(starts, count // 16):
        x, y = windows(tokens, part, c.context, device)
        for a in c.budgets:
            cache = model.new_cache(len(part), c.context)
            model.hidden(x[:, :half], a, cache)
            for b in c.budgets:
                for layer in cache:
                    layer.length = half                             # forget what the last b has read
                losses[a][b] += model(x[:, half:], y[:, half:], b, cache)[1].item() * len(part) / count
    return c.attention, {a: {b: perplexity(loss) for b, loss in row.items()} for a, row in losses.items()}


def bench(args):
    args.out.mkdir(parents=True, exist_ok=True)
    device = pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = dict(device=name, torch=torch.__version__)
    if args.switch:
        result["perplexity"] = tables = {}
        for run in args.switch:
            variant, table = switching(run, device)
            tables[str(run)] = table
            print(f"\n{run}, {variant}: perplexity of text read at b heads after a prefix written at a heads\n")
            print_row("a \\ b", *table, head=True)
            for a, row in table.items():
                print_row(a, *(f"{x:.3f}" for x in row.values()))
        draw_switching(tables, args.out / "switch.png")
    else:
        config, models, result["preset"] = make_config(PRESETS.get(args.preset, {})), PUBLISHED, args.preset
        if args.preset in PRESETS:
            ours = (variant for variant in ATTENTION if "pretrained" not in variant)
            models = {variant: dataclasses.replace(config, attention=variant) for variant in ours}
        print(f"{args.preset} on {name}, torch {torch.__version__}\n")
        result["sizes"] = [row for model, c in models.items() for row in sizes(model, c, device)]
        print_sizes(result["sizes"])
        if args.preset == "tiny" or args.preset in PRESETS and device.type == "cuda":
            torch.set_num_threads(1)                                # steps this short are not shared well
            result["speeds"] = speeds(config, SHAPES[device.type], device)
        if args.preset in PRESETS:
            draw_rows(config, args.out / "cache_row.png")
            draw(result["sizes"], result.get("speeds"), args.out / "bench_cache.png")
    print("\n" + json.dumps(result))


def main():
    parser = Parser(__doc__)
    parser.add_argument("--preset", default="tiny", choices=[*PRESETS, "deepseek-v3"], help="sizes of the model")
    parser.add_argument("--switch", type=Path, nargs="+", metavar="RUN", help="measure these runs of train.py instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--out", default=Path("out"), type=Path, help="folder of the figures")
    parser.attempt(bench, parser.parse_args())


if __name__ == "__main__":
    main()
