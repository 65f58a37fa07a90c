"""
Continue a prompt with a trained model at any head budget.

    python sample.py --heads 4 --prompt "class Tree:"
    python sample.py --heads 12:64,4:*       the budget changes while generating: 64 tokens at 12 heads, the rest at 4
    python sample.py --compare               the same prompt at every budget, with tokens/s and the size of the cache
    python sample.py --prompt "$(cat story.txt)"
"""

import codecs
import functools
import re
import sys
import time
from pathlib import Path

import torch

from common import (
    Parser,
    load,
    pick_device,
    positive,
)  # the first of ours: it decides which file is matmla
from decode import fast


def schedule(text, n):
    """--heads for n new tokens, as GPT.stream takes it: None, a budget, or a list, "12:64,4:*" is 64 times 12, then 4.

    ValueError if it is neither a number nor a schedule.
    """
    if not text or text.isdecimal():
        return int(text) if text else None
    if not re.fullmatch(r"(\d+:\d+,)*\d+:(\d+|\*)", text):
        raise ValueError(
            f"--heads {text} is neither a number of heads nor a schedule like 12:64,4:*"
        )
    budgets = []
    for m, count in (part.split(":") for part in text.split(",")):
        budgets += [int(m)] * (n - len(budgets) if count == "*" else int(count))
    return budgets


def sample(args):
    device, write = pick_device(args.device), functools.partial(print, end="", flush=True)
    model, encoding = load(args.checkpoint, device)
    if device.type == "cuda":
        fast(model.bfloat16())  # in bfloat16, half the bytes are read per token
    elif sum(p.numel() for p in model.parameters()) < 1e7:
        torch.set_num_threads(1)  # a step is too short to be shared
    prompt = torch.tensor([encoding.encode_ordinary(args.prompt)], dtype=torch.long, device=device)
    for heads in model.config.budgets if args.compare else [schedule(args.heads, args.tokens)]:
        seeded = torch.Generator(device).manual_seed(args.seed)
        decoder = codecs.getincrementaldecoder("utf-8")(
            "replace"
        )  # a character may span several tokens
        times = []
        stream = model.stream(
            prompt, args.tokens, heads, args.temperature, args.top_k, args.top_p, seeded
        )
        for token in map(int, stream):
            new = (
                encoding.decode_single_token_bytes(token) if token < encoding.n_vocab else b"?"
            )  # a padding id
            times.append(time.perf_counter())
            if len(times) == 1:
                write(f"--- {heads} heads ---\n" * args.compare + args.prompt)
            write(decoder.decode(new, final=len(times) == args.tokens))
        write("\n")
        if args.compare and len(times) > 2:  # the first two read the prompt and warm up
            speed, cache = (len(times) - 2) / (times[-1] - times[1]), model.new_cache(1, 1).nbytes
            write(
                f"--- {heads} heads: {speed:,.0f} tokens/s, {cache:,} bytes of cache per token ---\n\n"
            )


def main():
    sys.stdout.reconfigure(
        encoding="utf-8", errors="strict"
    )  # also where the terminal would rather not
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default=Path("out/checkpoint.pt"), type=Path, help="written by train.py")
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--heads",
        default="",
        help="1 to all (the default), or a schedule heads:tokens, * for the rest",
    )
    one.add_argument(
        "--compare", action="store_true", help="once at each budget the model was trained for"
    )
    add("--prompt", default="import ", help="text to continue")
    add("--tokens", default=400, type=positive, help="how many new tokens")
    add("--temperature", default=0.8, type=float, help="0 always takes the most likely token")
    add("--top-k", default=40, type=positive, help="sample among this many most likely tokens")
    add(
        "--top-p",
        default=1.0,
        type=float,
        help="and among the fewest that have this much probability together",
    )
    add("--seed", default=0, type=int, help="the same seed gives the same text")
    add(
        "--device",
        default="auto",
        help="cuda, mps or cpu; auto takes the first of them that is there",
    )
    parser.attempt(sample, parser.parse_args())


if __name__ == "__main__":
    main()
