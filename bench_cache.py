"""
What a token costs in the cache of every variant, by the formula and in real tensors; then how fast they decode.

    python bench_cache.py                          the sizes train.py trains by default
    python bench_cache.py --preset paper           209M parameters, the MatMLA paper's scale; speed on a GPU only
    python bench_cache.py --preset deepseek-v3     published models, sizes only
    python bench_cache.py --switch out             a trained model's perplexity when the budget changes after a prefix

The last line of output is the same as one JSON object. The first two draw cache_row.png in --out: what a token leaves.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer

from common import (  # the first of ours: it decides which file is matmla
    Parser,
    evaluate,
    load,
    load_checkpoint,
    make_config,
    perplexity,
    pick_device,
    print_row,
)
from data import prepare, read_tokens
from decode import attend_one, fast, record
from matmla import ATTENTION, GPT, Config
from train import PRESETS

PUBLISHED = {  # sizes from the models' own config files; DeepSeek's hardware paper (arXiv:2505.09343) compares them
    "DeepSeek-V3": Config("mla", n_layer=61, d=7168, n_h=128, d_h=128, d_c=512, d_cq=1536, d_R=64),
    "Qwen2.5-72B": Config("gqa", n_layer=80, d=8192, n_h=64, n_kv=8, d_h=128),
    "LLaMA-3.1-405B": Config("gqa", n_layer=126, d=16384, n_h=128, n_kv=8, d_h=128),
}
SHAPES = {  # batch, tokens in the cache
    "cpu": [(1, 256), (1, 1024), (8, 1024)],
    "cuda": [(1, 1024), (1, 16384), (16, 1024), (16, 4096), (16, 16384), (64, 8192)],
}


def formula(c, m):
    """Numbers one token leaves in one layer, as the papers count them; m heads are kept by ragged nested MHA."""
    heads = {"mha": c.n_h, "nested_mha": m, "gqa": c.n_kv}
    return 2 * heads[c.attention] * c.d_h if c.attention in heads else c.d_c + c.d_R


def measure(config, heads, device):
    """Bytes one token takes in the bfloat16 tensors of a real cache."""
    with torch.device("meta"):  # the weights are not needed,
        model = GPT(dataclasses.replace(config, vocab_size=1, d_ff=1))
    model.embed.to_empty(device=device).bfloat16()  # only where and what they would be
    cache = model.new_cache(1, 64, heads)
    assert cache.nbytes == cache[0].rows.untyped_storage().nbytes()  # of all layers
    return cache.nbytes // 64


def sizes(models, device):
    """A table of {name: config}: one dict per model and per budget whose cache differs."""
    print(
        "\nWhat a token takes: numbers in one layer; bytes in all layers, bfloat16, by formula and measured"
    )
    rows = []
    for name, c in models.items():
        for m in c.budgets if ATTENTION[c.attention].nested else (c.n_h,):
            layout = {"nested_mha": f"at most {m} heads", "matmla": "any budget"}.get(
                c.attention, ""
            )
            row = dict(
                variant=name,
                layout=layout,
                numbers=formula(c, m),
                formula=formula(c, m) * c.n_layer * 2,
                measured=measure(c, m, device),
            )
            assert row["formula"] == row["measured"], f"formula and measurement differ: {row}"
            if row not in rows:  # MatMLA has one cache for all budgets
                print_row(row, head=not rows)
                rows.append(row)
    return rows


def seconds(call):
    """Of one call, on one thread: the median of blocks of calls in a row, together at least a second."""
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=1).median


def attend_all(q, k, v, positions, scale):
    """`attend_one` for a full cache. Without rows to leave out, SDPA may take its fastest kernel where every head has
    its own keys: so MHA is measured at its best, better than a growing cache allows."""
    if q.shape[2] > k.shape[2]:
        return attend_one(q, k, v, positions, scale)
    return F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=scale
    ).transpose(1, 2)


@torch.no_grad()
def step_seconds(config, reader, m, batch, length, new, device):
    """Seconds until the last of `length` tokens has its successor, where all but the `new` last are in the cache."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config)
    for block in model.blocks if reader == "naive" else []:
        block.attention.absorb_below = 0
    if device.type == "cuda":
        fast(
            model.bfloat16(),
            attend_all if config.attention in ("mha", "nested_mha") else attend_one,
        )
    cache, tokens = (
        model.new_cache(batch, length),
        torch.zeros(batch, new, dtype=torch.long, device=device),
    )
    for layer in cache:
        layer.rows.normal_()

    def step():
        for layer in cache:
            layer.length = length - new
        return model.step(tokens, m, cache).argmax(-1)

    return seconds(step)


def attention_read(c, batch, length, device):
    """Seconds one layer of a GPU takes to read the cache: softmax(qᵀk)v alone, without any projection."""
    n_kv = {"gqa": c.n_kv, "matmla": 1}.get(c.attention, c.n_h)
    rows = torch.randn(
        batch, length, n_kv, formula(c, c.n_h) // n_kv, device=device, dtype=torch.bfloat16
    )
    k, v = (rows, rows) if c.attention == "matmla" else rows.chunk(2, -1)
    q = torch.randn(batch, 1, c.n_h, k.shape[-1], device=device, dtype=torch.bfloat16)
    read, position = (
        torch.compile(attend_all, dynamic=False),
        torch.tensor([length - 1], device=device),
    )
    graph, _ = record(lambda: read(q, k, v, position, 0.1), device)
    return seconds(graph.replay)


def speeds(config, device):
    """A table of decoding and prefill: one dict per shape, variant, reader and budget.

    On a CPU only beside MHA: there, absolute times say more about the machine than about the cache.
    """
    gpu, all_heads, rows = device.type == "cuda", config.n_h, []
    readers = [
        ("mha", "", all_heads),
        ("gqa", "", all_heads),
        ("nested_mha", "full", min(config.budgets)),
        ("matmla", "naive", all_heads),
        *(("matmla", "absorbed", m) for m in config.budgets),
    ]
    if gpu:
        x, y = torch.ones(2, 2**30, dtype=torch.uint8, device=device)
        copied = 2 * x.nbytes / seconds(lambda: y.copy_(x))  # bytes per second: what memory can do
    print(
        "\nDecoding one token of every sequence, with `length` tokens in the cache; and reading all of them"
    )
    for (batch, length), (name, reader, m) in itertools.product(SHAPES[device.type], readers):
        c = dataclasses.replace(config, attention=name, context=length)
        step, prefill = step_seconds(c, reader, m, batch, length, 1, device), None
        if batch * length <= 2**16 and reader != "naive":
            prefill = step_seconds(c, reader, m, batch, length, length, device)
        if name == "mha":  # the first of every shape
            mha_step, mha_prefill = step, prefill
        row = dict(batch=batch, length=length, variant=name, reader=reader, heads=m)
        if gpu:
            read = formula(c, m) * c.n_layer * 2 * batch * length
            alone = (
                attention_read(c, batch, length, device)
                if m == all_heads and reader != "naive"
                else None
            )
            row |= {
                "step, µs": step * 1e6,
                "tokens/s": batch / step,
                "GB/s": read / step / 1e9,
                "of copy": read / step / copied,
                "attention read, µs": alone and alone * 1e6,
                "prefill, ms": prefill and prefill * 1e3,
            }
        row |= {
            "step / MHA's": step / mha_step,
            "prefill / MHA's": prefill and prefill / mha_prefill,
        }
        print_row(row, head=not rows)
        rows.append(row)
        torch.compiler.reset()
    return rows


def draw_rows(c, path):
    """What one token leaves in one layer, to scale: one unit of width is one number."""
    axes = Figure(figsize=(10, 3), layout="constrained").subplots()
    pairs = [("k", c.d_h, "tab:blue"), ("v", c.d_h, "tab:orange")]
    latent, small = [("$c_{KV}$", c.d_c, "tab:green"), ("$k_R$", c.d_R, "tab:blue")], min(c.budgets)
    rows = {
        "MHA, nested MHA full": pairs * c.n_h,
        f"nested MHA ragged, {small} heads": pairs * small,
        f"GQA, {c.n_kv} groups": pairs * c.n_kv,
        "MLA, MatMLA at every budget": latent,
    }
    for y, parts in enumerate(rows.values()):
        x = 0
        for label, width, color in parts:
            axes.barh(y, width, left=x, color=color, edgecolor="white", height=0.7)
            axes.text(x + width / 2, y, label, ha="center", va="center", color="white", fontsize=8)
            x += width
        axes.text(x, y, f"  {x} numbers", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(
        xlabel="numbers that one token leaves in one layer of the cache",
        xlim=(0, 2.3 * c.n_h * c.d_h),
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.figure.savefig(path, dpi=150)


def switching(run, device):
    """{a: {b: perplexity}} of a run: of held-out text at budget b after a prefix, half a context, that budget a wrote.

    ValueError for a run that has no held-out text, or one budget only.
    """
    saved = load_checkpoint(run / "checkpoint.pt", device)
    model, _ = load(run / "checkpoint.pt", device, saved)
    c, settings = model.config, saved["settings"]
    if "data" not in settings:
        raise ValueError(f"{run} was not trained by train.py, so it has no held-out text")
    if not ATTENTION[c.attention].nested:
        raise ValueError(f"{run} is {c.attention}, which has one budget only")
    folder = prepare(settings["data"], saved["encoding"], settings["tokens"], c.vocab_size)
    _, tokens = read_tokens(folder, c.context, c.vocab_size)
    losses = {a: evaluate(model, tokens, 128, prefix=a) for a in c.budgets}
    return {a: {b: perplexity(loss) for b, loss in row.items()} for a, row in losses.items()}


def bench(args):
    args.out.mkdir(parents=True, exist_ok=True)
    device = pick_device(args.device)
    result = dict(
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        torch=torch.__version__,
    )
    if args.switch:
        result["perplexity"] = {str(run): switching(run, device) for run in args.switch}
        for run, table in result["perplexity"].items():
            print(f"\n{run}: perplexity of text read at b heads after a prefix written at a heads")
            for a, row in table.items():
                print_row({"a \\ b": a} | row, head=a == max(table))
    elif args.preset == "deepseek-v3":
        result["sizes"] = sizes(PUBLISHED, device)
    else:
        config, result["preset"] = make_config(PRESETS[args.preset]), args.preset
        models = {
            v: dataclasses.replace(config, attention=v) for v in ATTENTION if "pretrained" not in v
        }
        result["sizes"] = sizes(models, device)
        draw_rows(config, args.out / "cache_row.png")
        if args.preset == "tiny" or device.type == "cuda":
            result["speeds"] = speeds(config, device)
    print("\n" + json.dumps(result))


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "--preset", default="tiny", choices=[*PRESETS, "deepseek-v3"], help="sizes of the model"
    )
    parser.add_argument(
        "--switch",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="measure these runs of train.py instead",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"]
    )
    parser.add_argument("--out", default=Path("out"), type=Path, help="folder of the figure")
    parser.attempt(bench, parser.parse_args())


if __name__ == "__main__":
    main()
