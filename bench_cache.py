"""
What one token costs in the cache, for every variant: by the formula, and as real tensors measure.

    python bench_cache.py                   the sizes train.py trains by default
    python bench_cache.py --preset paper    209M parameters, the MatMLA paper's scale
"""

import dataclasses
import json
import sys

import torch

from matmla import ATTENTION, GPT
from train import PRESETS, Parser, make_config


def formula(c, m):
    """Numbers one token leaves in one layer, as the papers count them; m heads are kept by ragged nested MHA."""
    return {
        "mha": 2 * c.n_h * c.d_h,
        "nested_mha": 2 * m * c.d_h,
        "gqa": 2 * c.n_kv * c.d_h,
        "mla": c.d_c + c.d_R,
        "matmla": c.d_c + c.d_R,
    }[c.attention]


def measure(config, heads, dtype, capacity=64):
    """Bytes one token takes in the tensors of a real cache."""
    with torch.device("meta"):                                                  # the weights are not needed,
        model = GPT(config)
    model.embed.to_empty(device="cpu").to(dtype)                                # only where and what they would be
    cache = model.new_cache(1, capacity, heads)
    assert cache.rows.numel() * cache.rows.element_size() == cache.nbytes == cache.rows.untyped_storage().nbytes()
    return cache.nbytes // capacity


def table(config, dtype):
    """One dict per variant and budget whose cache differs."""
    rows = []
    for name in ATTENTION:
        c = dataclasses.replace(config, attention=name)
        budgets = c.budgets if ATTENTION[name].nested else (c.n_h,)
        for m in budgets:
            layout = {"nested_mha": "full, any budget" if m == c.n_h else f"ragged, at most {m} heads"}.get(name, "")
            layout = f"any budget of {', '.join(map(str, budgets))}" if name == "matmla" else layout
            if name == "matmla" and m != c.n_h:
                assert measure(c, m, dtype) == measure(c, c.n_h, dtype)         # one cache for all budgets
                continue
            rows.append({
                "variant": name,
                "layout": layout,
                "numbers": formula(c, m),
                "formula": formula(c, m) * c.n_layer * dtype.itemsize,
                "measured": measure(c, m, dtype),
            })
    return rows


def main():
    parser = Parser(__doc__)
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="sizes of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the cache")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    config = make_config(PRESETS[args.preset])
    rows = table(config, dtype)
    print(f"{args.preset}: {config.n_layer} layers, {args.dtype}\n")
    print("| variant | cache | numbers per token and layer | bytes per token, formula | measured | share of MHA | tokens per GiB |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['variant']} | {r['layout']} | {r['numbers']:,} | {r['formula']:,} | {r['measured']:,} "
              f"| {r['measured'] / rows[0]['measured']:.0%} | {2**30 // r['measured']:,} |")
    print("\n" + json.dumps({"preset": args.preset, "dtype": args.dtype, "rows": rows}))
    if any(r["formula"] != r["measured"] for r in rows):
        sys.exit("formula and measurement differ")


if __name__ == "__main__":
    main()
