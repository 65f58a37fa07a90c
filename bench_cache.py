"""
What one token costs in the cache of every variant, by the formula and as real tensors measure; then how fast they decode.

    python bench_cache.py                          the sizes train.py trains by default
    python bench_cache.py --preset paper           209M parameters, the MatMLA paper's scale
    python bench_cache.py --preset deepseek-v3     published models, sizes only
    python bench_cache.py --switch out             a trained model's perplexity when the budget changes after a prefix

The last line of output is the same as one JSON object. Figures go to --out: cache_row.png, what a token leaves, to scale, and
bench_cache.png, size and speed against context, of the first two; switch.png of the last.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import decode
from decode import attend_one
from matmla import ATTENTION, GPT, Config
from train import PRESETS, Parser, load, load_checkpoint, make_config, pick_device, perplexity, prepare, read_tokens, windows

PUBLISHED = {    # sizes from the models' own config files; DeepSeek-V3's hardware paper (arXiv:2505.09343) compares them
    "DeepSeek-V3": Config("mla", n_layer=61, d=7168, n_h=128, d_h=128, d_c=512, d_cq=1536, d_R=64, budgets=(128,)),
    "Qwen2.5-72B": Config("gqa", n_layer=80, d=8192, n_h=64, n_kv=8, d_h=128, budgets=(64,)),
    "LLaMA-3.1-405B": Config("gqa", n_layer=126, d=16384, n_h=128, n_kv=8, d_h=128, budgets=(128,)),
}
SHAPES = {    # batch, tokens in the cache
    "cpu": [(1, 256), (1, 1024), (8, 1024)],
    "cuda": [(1, 1024), (1, 16384), (16, 1024), (16, 4096), (16, 16384), (64, 8192)],
}

# ---------------------------------------------------------------- size


def formula(c, m):
    """Numbers one token leaves in one layer, as the papers count them; m heads are kept by ragged nested MHA."""
    return {
        "mha": 2 * c.n_h * c.d_h,
        "nested_mha": 2 * m * c.d_h,
        "gqa": 2 * c.n_kv * c.d_h,
        "mla": c.d_c + c.d_R,
        "matmla": c.d_c + c.d_R,
    }[c.attention]


def measure(config, heads, device):
    """Bytes one token takes in the bfloat16 tensors of a real cache: by the tensors; on a GPU by the allocator too."""
    with torch.device("meta"):                                                  # the weights are not needed,
        model = GPT(dataclasses.replace(config, vocab_size=1, d_ff=1))
    model.embed.to_empty(device=device).bfloat16()                              # only where and what they would be
    capacity = 64 if device.type == "cpu" else 2**21 // config.n_layer          # the allocator deals in pieces of 2 MiB
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    cache = model.new_cache(1, capacity, heads)
    assert cache.nbytes == cache.rows.untyped_storage().nbytes()
    if device.type == "cuda":
        assert abs(torch.cuda.memory_allocated() - before - cache.nbytes) < 2**21, "the allocator says otherwise"
    return cache.nbytes // capacity


def sizes(name, config, device):
    """One dict per budget whose cache differs."""
    rows = []
    for m in config.budgets if ATTENTION[config.attention].nested else (config.n_h,):
        layout = {"nested_mha": "full, any budget" if m == config.n_h else f"ragged, at most {m} heads",
                  "matmla": f"any budget of {', '.join(map(str, config.budgets))}"}.get(config.attention, "")
        if config.attention == "matmla" and m != config.n_h:
            assert measure(config, m, device) == rows[0]["measured"]            # one cache for all budgets
            continue
        rows.append(dict(variant=name, layout=layout, numbers=formula(config, m),
                         formula=formula(config, m) * config.n_layer * 2, measured=measure(config, m, device)))
    return rows


def print_sizes(rows):
    print("| variant | cache | numbers per token and layer | bytes per token, formula | measured | share of the first | tokens per GiB |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['variant']} | {r['layout']} | {r['numbers']:,} | {r['formula']:,} | {r['measured']:,} "
              f"| {r['measured'] / rows[0]['measured']:.0%} | {2**30 // r['measured']:,} |")
    if any(r["formula"] != r["measured"] for r in rows):
        sys.exit("formula and measurement differ")


# ---------------------------------------------------------------- speed


def seconds(call, device, n=10):
    """Of one call: the best of n on a CPU, n in a row on a GPU, which works behind the host's back."""
    call(), call()
    if device.type == "cpu":
        times = []
        for _ in range(n):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)
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
    """`attend_one` for a full cache. Without rows to mask out, SDPA may take its fastest kernel where every head has its own
    keys: so MHA is measured at its best, better than a growing cache allows."""
    if q.shape[2] > k.shape[2]:
        return attend_one(q, k, v, positions, scale)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def random_model(config, device):
    """A model with random weights, in the dtype it would run in there."""
    with torch.device(device):
        model = GPT(config)
    return model.bfloat16() if device.type == "cuda" else model


@torch.no_grad()
def decode_step(config, reader, m, batch, length, device):
    """Seconds of one decoding step that finds `length` - 1 tokens in the cache, of a model with random weights."""
    torch.manual_seed(0)
    model = random_model(config, device)
    if reader == "naive":
        for block in model.blocks:
            block.attention.short = 0
    cache, token = model.new_cache(batch, length), torch.zeros(batch, 1, dtype=torch.long, device=device)
    for rows in cache.rows:
        rows.normal_()
    decode.attend_one = attend_all if config.attention in ("mha", "nested_mha") else attend_one
    step = decode.Step(model, cache, lambda logits: logits.argmax(-1, keepdim=True)) if device.type == "cuda" else None

    def once():
        cache.length = length - 1
        return step(token, m) if step else model(token, heads=m, cache=cache)[0]

    return seconds(once, device)


@torch.no_grad()
def attention_read(config, batch, length, device):
    """Seconds one layer of a GPU takes to read the cache: softmax(qᵀk)v alone, without any projection."""
    c = config
    absorbed = c.attention in ("mla", "matmla")
    n_kv, width = (1, c.d_c + c.d_R) if absorbed else (c.n_kv if c.attention == "gqa" else c.n_h, c.d_h)
    rows = torch.randn(batch, length, n_kv, width * (1 if absorbed else 2), device=device, dtype=torch.bfloat16)
    k, v = (rows, rows) if absorbed else rows.chunk(2, -1)
    q = torch.randn(batch, 1, c.n_h, width, device=device, dtype=torch.bfloat16)
    read = torch.compile(attend_all, dynamic=False)
    position = torch.tensor([length - 1], device=device)
    read(q, k, v, position, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read(q, k, v, position, 0.1)
    return seconds(graph.replay, device, n=20)


@torch.no_grad()
def prefill(config, m, batch, length, device):
    """Seconds to read a prompt."""
    model = random_model(config, device)
    cache, prompt = model.new_cache(batch, length), torch.zeros(batch, length, dtype=torch.long, device=device)

    def once():
        cache.length = 0
        return model.hidden(prompt, m, cache)

    return seconds(once, device, n=5)


def speeds(config, shapes, device):
    """One dict per shape, variant, reader and budget. `step` is relative to MHA's on a CPU: absolute times are for GPUs."""
    copied, rows = copy_bandwidth(device), []
    for batch, length in shapes:
        for name, reader, budgets in (("mha", "", None), ("gqa", "", None), ("nested_mha", "full", config.budgets[-1:]),
                                      ("matmla", "naive", config.budgets[:1]), ("matmla", "absorbed", config.budgets)):
            c = dataclasses.replace(config, attention=name, context=length)
            for m in budgets or (c.n_h,):
                step = decode_step(c, reader, m, batch, length, device)
                read = formula(c, m) * c.n_layer * 2 * batch * length
                row = dict(batch=batch, length=length, variant=name, reader=reader, heads=m, step=step,
                           tokens_per_second=batch / step, cache_bytes=read, bandwidth=read / step, copy_bandwidth=copied)
                if name == "mha":                                               # the first of every shape
                    mha = row
                row["to_mha"] = step / mha["step"]
                if batch * length <= 2**16 and reader != "naive":
                    row["prefill"] = prefill(c, m, batch, length, device)
                if device.type == "cuda" and m == c.n_h and name in ("mha", "gqa", "matmla") and reader != "naive":
                    row["attention_read"] = attention_read(c, batch, length, device)
                rows.append(row)
                torch.compiler.reset()
                print_speed(row, mha, len(rows) == 1, device)
    return rows


def print_speed(r, mha, first, device):
    """One line of the table, as soon as it is known; the head of the table before the first."""
    gpu = device.type == "cuda"
    if first:
        print(f"\nDecoding one token of every sequence; GB/s: the cache over the time of the step, beside a copy's "
              f"{r['copy_bandwidth'] / 1e9:,.0f}" if gpu else "\nDecoding one token of every sequence, times relative to MHA's")
        print("| batch | cached | variant | heads | " + ("step, µs | tokens/s | GB/s | of copy | attention read, µs | prefill, ms | " if gpu else "")
              + "step / MHA's" + ("" if gpu else " | prefill / MHA's") + " |")
        print("|---" * (11 if gpu else 6) + "|")
    fill = r.get("prefill")
    cells = [r["batch"], f"{r['length']:,}", f"{r['variant']} {r['reader']}".strip(), r["heads"]]
    if gpu:
        cells += [f"{r['step'] * 1e6:,.0f}", f"{r['tokens_per_second']:,.0f}", f"{r['bandwidth'] / 1e9:,.0f}",
                  f"{r['bandwidth'] / r['copy_bandwidth']:.0%}", f"{r['attention_read'] * 1e6:.1f}" if "attention_read" in r else "",
                  f"{fill * 1e3:.2f}" if fill else ""]
    cells += [f"{r['to_mha']:.2f}"] + ([] if gpu else [f"{fill / mha['prefill']:.2f}" if fill else ""])
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def draw_rows(config, path):
    """What one token leaves in one layer, to scale: one unit of width is one number."""
    from matplotlib.figure import Figure

    c = config
    axes = (figure := Figure(figsize=(10, 3), layout="constrained")).subplots()
    pairs = [("k", c.d_h, "tab:blue"), ("v", c.d_h, "tab:orange")]
    latent = [("$c_{KV}$", c.d_c, "tab:green"), ("$k_R$", c.d_R, "tab:blue")]
    small = min(c.budgets)
    rows = [("MHA, nested MHA full", pairs * c.n_h), (f"nested MHA ragged, {small} heads", pairs * small),
            (f"GQA, {c.n_kv} groups", pairs * c.n_kv), ("MLA, MatMLA at every budget", latent)]
    for y, (name, parts) in enumerate(rows):
        x = 0
        for label, width, color in parts:
            axes.barh(y, width, left=x, color=color, edgecolor="white", height=0.7)
            axes.text(x + width / 2, y, label, ha="center", va="center", color="white", fontsize=8)
            x += width
        axes.text(x, y, f"  {x} numbers", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set(xlabel="numbers that one token leaves in one layer of the cache", xlim=(0, 2.3 * c.n_h * c.d_h))
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw(size_rows, speed_rows, path):
    """Cache size and, if it was measured, decoding speed against context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10 if speed_rows else 5, 4), layout="constrained")
    left, *right = figure.subplots(1, 2 if speed_rows else 1, squeeze=False)[0]
    lengths = [2**i for i in range(8, 18)]
    for i, r in enumerate(size_rows):                                           # each thinner, to show where they coincide
        left.plot(lengths, [r["measured"] * n / 2**20 for n in lengths], linewidth=8 - i, label=f"{r['variant']} {r['layout']}".strip())
    left.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="MiB per sequence, bfloat16")
    for axes in right:
        batch = 16 if any(r["batch"] == 16 for r in speed_rows) else 1
        lines = {}
        for r in speed_rows:
            if r["batch"] == batch:
                lines.setdefault(f"{r['variant']} {r['reader']}".strip() + f", {r['heads']} heads", []).append(r)
        for label, line in lines.items():
            axes.plot([r["length"] for r in line], [r["tokens_per_second"] for r in line], "o-", label=label)
        axes.set(xscale="log", xlabel="tokens in the cache", ylabel=f"tokens per second, batch {batch}", ylim=(0, None))
    for axes in (left, *right):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- the budget changes on the way


@torch.no_grad()
def switching(run, device, count=128):
    """Perplexity of held-out text read at budget b after a prefix, half a context long, written at budget a: {a: {b: ...}}."""
    saved = load_checkpoint(run / "checkpoint.pt", device)
    model, _ = load(run / "checkpoint.pt", device, saved)
    if "data" not in saved["settings"]:
        raise ValueError(f"{run} was not trained by train.py, so it has no held-out text")
    c, args = model.config, argparse.Namespace(**saved["settings"], encoding=saved["encoding"])
    if not ATTENTION[c.attention].nested:
        raise ValueError(f"{run} is {c.attention}, which has one budget only")
    _, tokens = read_tokens(prepare(args), args, c)
    starts = np.linspace(0, len(tokens) - c.context - 1, count).astype(int)
    table, half = {}, c.context // 2
    for a in c.budgets:
        table[a] = dict.fromkeys(c.budgets, 0.0)
        for part in np.array_split(starts, count // 16):
            x, y = windows(tokens, part, c.context, device)
            cache = model.new_cache(len(part), c.context)
            model(x[:, :half], heads=a, cache=cache)
            for b in c.budgets:
                cache.length = half
                table[a][b] += model(x[:, half:], y[:, half:], b, cache)[1].item() * len(part) / count
    return c.attention, {a: {b: perplexity(loss) for b, loss in row.items()} for a, row in table.items()}


def draw_switching(tables, path):
    """A panel per run of {run: {a: {b: perplexity}}}: how many percent each b loses or wins by a prefix that b did not write."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3 * len(tables), 3.2), layout="constrained")
    for axes, (run, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items()):
        change = [[100 * (x / table[b][b] - 1) for b, x in row.items()] for row in table.values()]
        axes.imshow(change, cmap="RdBu_r", vmin=-1, vmax=1)
        for y, (row, perplexities) in enumerate(zip(change, table.values())):
            for x, (percent, value) in enumerate(zip(row, perplexities.values())):
                axes.text(x, y, f"{value:.2f}\n{round(percent, 2) + 0:+}%", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(table)), table)
        axes.set_yticks(range(len(table)), table)
        axes.set(xlabel="heads that read (%: beside its own prefix)", ylabel="heads that wrote the prefix", title=run)
    figure.savefig(path, dpi=150)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--preset", default="tiny", choices=[*PRESETS, "deepseek-v3"], help="sizes of the model")
    parser.add_argument("--switch", type=Path, nargs="+", metavar="RUN", help="measure these runs of train.py instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--out", default=Path("out"), type=Path, help="folder of the figures")
    parser.attempt(bench, parser.parse_args())


def bench(args):
    args.out.mkdir(parents=True, exist_ok=True)
    device = pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result = dict(device=name, torch=torch.__version__)
    if args.switch:
        result["perplexity"] = {}
        for run in args.switch:
            variant, table = switching(run, device)
            result["perplexity"][str(run)] = table
            print(f"{run}, {variant}: perplexity of text read at b heads after a prefix written at a heads\n")
            print("| a \\ b | " + " | ".join(map(str, table)) + " |\n" + "|---" * (len(table) + 1) + "|")
            for a, row in table.items():
                print(f"| {a} | " + " | ".join(f"{x:.3f}" for x in row.values()) + " |")
            print()
        draw_switching(result["perplexity"], args.out / "switch.png")
    elif args.preset == "deepseek-v3":
        result["sizes"] = [row for model, config in PUBLISHED.items() for row in sizes(model, config, device)]
        print_sizes(result["sizes"])
    else:
        config = make_config(PRESETS[args.preset])
        print(f"{args.preset}: {config.n_layer} layers; {name}, torch {torch.__version__}\n")
        result["preset"] = args.preset
        result["sizes"] = [row for v in ATTENTION for row in sizes(v, dataclasses.replace(config, attention=v), device)]
        print_sizes(result["sizes"])
        if device.type == "cpu" and args.preset != "tiny":
            print("\nTo measure its speed, run this on a GPU.")
        else:
            torch.set_num_threads(1)                                            # steps this short are not shared well
            result["speeds"] = speeds(config, SHAPES["cuda" if device.type == "cuda" else "cpu"], device)
        draw_rows(config, args.out / "cache_row.png")
        draw(result["sizes"], result.get("speeds"), args.out / "bench_cache.png")
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
