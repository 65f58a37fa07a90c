"""
What a token costs in the cache of every attention, by formula and in real tensors; what queries,
keys and values cost, by the paper's Table 2 and counted; and how fast each attention decodes.

    python bench_cache.py                          the sizes that train.py trains by default
    python bench_cache.py --preset paper           the paper's; speed on a GPU only
    python bench_cache.py --preset deepseek-v3     published models; speed of 128 heads on a GPU
    python bench_cache.py --switch out             perplexity of a trained model when the number of
                                                   heads changes in the middle of a text

The last line of output is the same as one JSON object.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from common import (
    PRESETS,
    Parser,
    Table,
    evaluate_after,
    load_run,
    make_config,
    perplexity,
)
from decode import attend_one, capture_graph, fast
from devices import pick_device
from matmla import ATTENTION, GPT, Cache, Config

# Sizes from the models' own config files. DeepSeek's paper on hardware, arXiv:2505.09343, compares
# their caches. Speed is measured of the first, whose d_ff is that of its dense layers.
PUBLISHED = {
    "DeepSeek-V3": Config(
        "mla", n_layer=61, d=7168, n_h=128, d_h=128, d_c=512, d_cq=1536, d_R=64, d_ff=18432
    ),
    "Qwen2.5-72B": Config("gqa", n_layer=80, d=8192, n_h=64, n_kv=8, d_h=128),
    "LLaMA-3.1-405B": Config("gqa", n_layer=126, d=16384, n_h=128, n_kv=8, d_h=128),
}
SHAPES = {  # (sequences, tokens in the cache of each)
    "cpu": [(1, 256), (1, 1024), (8, 1024)],
    "cuda": [(1, 1024), (1, 16384), (16, 1024), (16, 4096), (16, 16384), (64, 8192)],
    "deepseek-v3": [(64, 8192)],
}


def show(title, rows):
    """Print rows, which are dicts, each as soon as it is there; of none, nothing. Their list."""
    table = Table()
    shown = []
    for row in rows:
        if not shown:
            print(f"\n{title}")
        table.add(row)
        shown.append(row)
    return shown


# Bytes


def cached_numbers(c, m):
    """What a token leaves in one layer, as the papers count; of nested MHA, if it keeps m heads."""
    pairs = {"mha": c.n_h, "nested_mha": m, "gqa": c.n_kv, "nested_gqa": c.n_kv}.get(c.attention)
    return 2 * pairs * c.d_h if pairs else c.d_c + c.d_R


def cached_bytes(config, m, device):
    """What a token takes in the bfloat16 tensors of a real cache, all layers."""
    with torch.device("meta"):  # weights take no memory here
        model = GPT(replace(config, vocab_size=1, d_ff=1))
    model.embed.to_empty(device=device).bfloat16()  # its device and dtype are those of a cache
    return sum(layer.rows.untyped_storage().nbytes() for layer in model.new_cache(1, 64, m)) // 64


def sizes(models, device):
    """Yield a row for each model of {name: config}, and for each budget whose cache differs."""
    for name, c in models.items():
        budgets = sorted(c.budgets) if ATTENTION[c.attention].nested else [c.n_h]
        largest = {cached_bytes(c, m, device): m for m in budgets}  # of those with equal caches
        for measured, m in reversed(largest.items()):
            yield {
                "attention": name,
                "layout": f"at most {m} heads" if c.attention == "nested_mha" else "",
                "numbers in a layer": cached_numbers(c, m),
                "bytes by formula": cached_numbers(c, m) * c.n_layer * 2,
                "bytes measured": measured,
            }


# The paper's costs


def table_2(c, alpha):
    """Table 2 of the MatMLA paper: (FLOPs, the same translated to our sizes, numbers in use).

    Of a token in one layer, on average, where a share alpha of all tokens uses half of the heads
    and the rest uses all. FLOPs are those of the projections that make q, k and v, 2 for each
    multiplication with its addition; numbers are those of the cache.
    """
    used = (1 - alpha / 2) * c.n_h  # heads of a token, on average
    if c.attention == "nested_mha":
        flops = 6 * used * c.d * c.d_h
        return flops, flops, 2 * used * c.d_h
    d_h = c.d_h + c.d_R  # the paper's d_h includes its r, our d_R
    flops = 6 * used * c.d_c * d_h - 2 * used * c.d_c * c.d_R + 4 * c.d * c.d_c + 2 * c.d * c.d_R

    # There a value is as wide as a key, here d_R narrower. There both latents have one width, here
    # that of queries has d_cq. (Nested MHA has neither, so nothing is to be translated.)
    ours = flops - 2 * used * c.d_c * c.d_R - (c.d_c - c.d_cq) * (2 * used * d_h + 2 * c.d)
    return flops, ours, c.d_c + c.d_R


def attend_nothing(q, k, v, positions, scale):
    """In place of attention: a result of its shape, for no operations."""
    return q.new_empty(*q.shape[:3], v.shape[-1])


def count(c, reader, sequences):
    """(FLOPs that make q, k and v, numbers cached) in one layer, counted by torch.

    sequences: for each a dict {heads: tokens} of its parts, one after the other, in a cache that
    has room for the most heads among them. reader: how a latent attention reads.
    """
    numbers = 0
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes without data
        layer = ATTENTION[c.attention](c)
        layer.absorb_below = math.inf if reader == "absorbed" else 0
        layer.attend = attend_nothing
        layer.W_O.weight = nn.Parameter(torch.empty(0, c.n_h * c.d_h))  # no output to project
        for parts in sequences:
            cache = Cache(torch.empty(1, sum(parts.values()), layer.row_width(max(parts))))
            numbers += cache.rows.numel()
            for m, tokens in parts.items():
                layer(torch.empty(1, tokens, c.d), m, cache)
    return counter.get_total_flops(), numbers


def costs(config):
    """Yield rows of Table 2, each with what is counted in our attention.

    Once each number of heads has a sequence of its own, and the two agree. Once they are mixed in
    one sequence: a pass for the tokens with half of the heads, then one for the others. These read
    the earlier rows with all heads, so nested MHA has to write, and MatMLA to expand, more than the
    formula counts. Absorbed, a token pays for nothing but its own heads.
    """
    T = 2 * config.context
    for name, reader in (("nested_mha", ""), ("matmla", "expanded"), ("matmla", "absorbed")):
        c = replace(config, attention=name)
        for alpha in (0, 0.5, 1):
            parts = {c.n_h // 2: int(alpha * T), c.n_h: T - int(alpha * T)}
            parts = {m: tokens for m, tokens in parts.items() if tokens}
            paper, ours, cached = table_2(c, alpha)
            apart = count(c, reader, [{m: tokens} for m, tokens in parts.items()])
            mixed = count(c, reader, [parts])
            assert apart == (ours * T, cached * T), f"{c}, {alpha}: {apart}"
            yield {
                "attention": name,
                "reader": reader,
                "α": str(alpha),
                "FLOPs in the paper": int(paper),
                "at our sizes": int(ours),
                "counted": apart[0] // T,
                "counted, mixed": mixed[0] // T,
                "numbers in the paper": int(cached),
                "cached": apart[1] // T,
                "cached, mixed": mixed[1] // T,
            }


# Speed


def seconds(call):
    """Of one call, on one thread: the median of blocks of calls that take a second together."""
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=1).median


def attend_all(q, k, v, positions, scale):
    """`attend_one` for a full cache, where nothing is left out.

    So SDPA may take its fastest kernel if heads have keys of their own, and MHA is measured at its
    best: better than a growing cache allows.
    """
    if q.shape[1] > 1 or q.shape[2] > k.shape[2]:
        return attend_one(q, k, v, positions, scale)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
    ).transpose(1, 2)


@torch.no_grad()
def step_seconds(c, reader, m, batch, length, new, device):
    """Seconds until the last of `length` tokens has a successor; all but `new` are in the cache.

    A GPU takes the step of `fast`, and for a prompt compiled blocks.
    """
    with torch.device(device):
        model = GPT(c)
        tokens = torch.zeros(batch, new, dtype=torch.long)
    for block in model.blocks:
        if reader == "expanded":
            block.attention.absorb_below = 0
    if device.type == "cuda":
        fast(model.bfloat16())
        for block in model.blocks:
            block.attention.attend = attend_all
            block.compile(dynamic=False)
    cache = model.new_cache(batch, length)
    for layer in cache:
        layer.rows.normal_()
        layer.length = length

    def step():
        cache.rewind(length - new)
        return model.step(tokens, m, cache).argmax(-1)

    return seconds(step)


def attention_seconds(c, m, batch, length, device):
    """Seconds a GPU takes to read one layer's cache: softmax(qᵀk)v alone, without projections."""
    slots = {"gqa": c.n_kv, "nested_gqa": c.n_kv, "matmla": 1}.get(c.attention, c.n_h)
    with torch.device(device):
        rows = torch.randn(batch, length, slots, cached_numbers(c, c.n_h) // slots).bfloat16()
        k, v = (rows, rows) if c.attention == "matmla" else rows[:, :, :m].chunk(2, -1)
        q = torch.randn(batch, 1, m, k.shape[-1]).bfloat16()
        last = torch.tensor([length - 1])
    read = torch.compile(attend_all, dynamic=False)
    graph, _ = capture_graph(lambda: read(q, k, v, last, 0.1), device)
    return seconds(graph.replay)


def speeds(config, readers, shapes, prompt, device):
    """Yield a row for each shape and each reader (attention, how it reads, heads).

    prompt: reading all tokens is timed, and not one step. Times are relative to the first reader's;
    on a CPU, the absolute ones say more about the machine than about the cache.
    """
    for batch, length in shapes:
        first = None
        for name, reader, m in readers:
            c = replace(config, attention=name, context=length)
            time = step_seconds(c, reader, m, batch, length, length if prompt else 1, device)
            first = first or time
            row = {
                "sequences": batch,
                "tokens": length,
                "attention": name,
                "reader": reader,
                "heads": m,
                "relative time": time / first,
                "ms": time * 1e3,
            }
            if not prompt and device.type == "cuda" and reader != "expanded":
                cached = 2 * cached_numbers(c, m)  # bytes of a token in a layer
                flops = m * (4 * c.d_c + 2 * c.d_R if name == "matmla" else 4 * c.d_h)
                row |= {
                    "GB/s of cache": cached * c.n_layer * batch * length / time / 1e9,
                    "FLOPs per byte": flops / cached,
                    "attention, ms": attention_seconds(c, m, batch, length, device) * 1e3,
                }
            yield row
            torch.compiler.reset()


def switching(run, device):
    """Yield rows of held-out perplexity with b heads, each after a prefix with another a.

    The prefix is half a context.
    """
    model, held_out, _ = load_run(run, device)
    budgets = model.config.budgets
    for a in budgets:
        losses = evaluate_after(a, model, held_out, 128, budgets)
        yield {"a \\ b": a} | {str(b): perplexity(loss) for b, loss in zip(budgets, losses)}


def measure(preset, device):
    """All tables of a preset, {name: rows}. Their speed is left out if it would take too long."""
    if preset == "deepseek-v3":
        models = PUBLISHED
        config = replace(PUBLISHED["DeepSeek-V3"], n_layer=1)  # of 61 that are alike
        readers = [("matmla", "absorbed", m) for m in (128, 64, 32)]
    else:
        config = make_config(PRESETS[preset])
        models = {
            name: replace(config, attention=name) for name in ATTENTION if "pretrained" not in name
        }
        readers = [
            ("mha", "", config.n_h),
            ("nested_mha", "full", min(config.budgets)),
            ("gqa", "", config.n_h),
            ("nested_gqa", "", min(config.budgets)),
            ("matmla", "expanded", config.n_h),
            *(("matmla", "absorbed", m) for m in config.budgets),
        ]
    tables = {
        "sizes": show("What a token leaves in the cache, in bfloat16.", sizes(models, device)),
        "costs": show(
            "The paper's Table 2: FLOPs to make q, k and v of a token in one layer, and numbers\n"
            "cached, if a share α of the tokens has half of the heads. Counted: the same, with a\n"
            "sequence for each number of heads. Mixed: in one sequence, where the others read\n"
            "these tokens with all heads. That costs more, unless MatMLA reads absorbed.",
            costs(config),
        ),
    }
    if preset == "tiny" or device.type == "cuda":
        shapes = SHAPES.get(preset, SHAPES[device.type])
        tables["decoding"] = show(
            "A step with one new token for every sequence, whose others are in the cache.",
            speeds(config, readers, shapes, False, device),
        )
        readers = [one for one in readers if one[1] != "expanded"]  # as all prompts are read
        shapes = [(batch, length) for batch, length in shapes if batch * length <= 2**16]
        tables["prompts"] = show(
            "A prompt: all tokens of every sequence at once.",
            speeds(config, readers, shapes, True, device),
        )
    return tables


def bench(args):
    """Print the tables, and then all of them as JSON."""
    device = pick_device(args.device)
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
    }
    if args.switch:
        title = "{}: perplexity of text with b heads, after a prefix with a heads"
        result["perplexity"] = {
            str(run): show(title.format(run), switching(run, device)) for run in args.switch
        }
    else:
        result |= measure(args.preset, device)
    print("\n" + json.dumps(result))


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", choices=[*PRESETS, "deepseek-v3"], help="sizes of the model")
    add("--switch", type=Path, nargs="+", metavar="RUN", help="measure these runs of train.py")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.run(bench, parser.parse_args())


if __name__ == "__main__":
    main()
