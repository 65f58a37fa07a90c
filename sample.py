"""
Continue a prompt with a trained model at any head budget.

    python sample.py --heads 4 --prompt "class Tree:"
    python sample.py --heads 12:64,4:*       the budget changes while generating: 64 tokens at 12 heads, the rest at 4
    python sample.py --compare               the same prompt at every budget, with tokens/s and the size of the cache
    python sample.py --prompt "$(cat story.txt)"
"""

import codecs
import re
import sys
import time
from pathlib import Path

import torch

from common import Parser, load, pick_device, positive    # the first of ours: it decides which file is matmla
from data import token_bytes
from decode import fast


def schedule(text, n):
    """--heads for n new tokens, as GPT.stream takes it: None, a budget, or a list, "12:64,4:*" is 64 times 12, then 4.

    ValueError if it is neither a number nor a schedule, or is for another number of tokens.
    """
    if not text or text.isdecimal():
        return int(text) if text else None
    if not re.fullmatch(r"(\d+:\d+,)*\d+:(\d+|\*)", text):
        raise ValueError(f"--heads {text} is neither a number of heads nor a schedule like 12:64,4:*")
    budgets = []
    for m, count in (part.split(":") for part in text.split(",")):
        budgets += [int(m)] * (n - len(budgets) if count == "*" else int(count))
    if len(budgets) != n:
        raise ValueError(f"--heads {text} is a schedule for {len(budgets)} tokens, but there are {n}; end it with :*")
    return budgets


def write(text):
    """To the screen as it comes, as UTF-8 also where the terminal would rather not."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def sample(args):
    device, text = pick_device(args.device), args.prompt
    try:
        text.encode()                                               # fails for bytes that the terminal could not decode
    except UnicodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text: {error}") from None
    model, encoding = load(args.checkpoint, device)
    if device.type == "cuda":
        fast(model.bfloat16())                                      # in bfloat16, half the bytes are read per token
    elif sum(p.numel() for p in model.parameters()) < 1e7:
        torch.set_num_threads(1)                                    # a step is too short to be shared
    prompt = torch.tensor([encoding.encode_ordinary(text)] * args.samples, dtype=torch.long, device=device)
    for heads in model.config.budgets if args.compare else [schedule(args.heads, args.tokens)]:
        seeded = torch.Generator(device).manual_seed(args.seed)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
        new, times = [], []
        for tokens in model.stream(prompt, args.tokens, heads, args.temperature, args.top_k, args.top_p, seeded):
            new.append([token_bytes(encoding, token) for token in tokens.tolist()])
            times.append(time.perf_counter())
            if args.compare and len(new) == 1:
                write(f"--- {heads} heads ---\n")
            if args.samples == 1 and len(new) == 1:
                write(text)
            if args.samples == 1:
                write(decoder.decode(new[-1][0], final=len(new) == args.tokens))
        if args.samples > 1:
            write("\n---\n".join(text + b"".join(one).decode("utf-8", "replace") for one in zip(*new)))
        write("\n")
        if args.compare and len(times) > 2:                         # the first two read the prompt and warm up
            speed = args.samples * (len(times) - 2) / (times[-1] - times[1])
            cache = model.new_cache(args.samples, 1).nbytes
            write(f"--- {heads} heads: {speed:,.0f} tokens/s, {cache:,} bytes of cache per token ---\n\n")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default=Path("out/checkpoint.pt"), type=Path, help="written by train.py")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--heads", default="", help="1 to all (the default), or a schedule heads:tokens, * for the rest")
    one.add_argument("--compare", action="store_true", help="once at each budget the model was trained for")
    add("--prompt", default="import ", help="text to continue")
    add("--tokens", default=400, type=positive, help="how many new tokens")
    add("--samples", default=1, type=positive, help="how many texts, in one batch")
    add("--temperature", default=0.8, type=float, help="0 always takes the most likely token")
    add("--top-k", default=40, type=positive, help="sample among this many most likely tokens")
    add("--top-p", default=1.0, type=float, help="and among the fewest that have this much probability together")
    add("--seed", default=0, type=int, help="the same seed gives the same text")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    parser.attempt(sample, parser.parse_args())


if __name__ == "__main__":
    main()
