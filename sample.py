"""
Continue a prompt with a trained model at any head budget.

    python sample.py --heads 4 --prompt "class Tree:"
    python sample.py --heads 12:64,4:*              the budget changes while generating: 64 tokens at 12 heads, the rest at 4
    python sample.py --compare                      the same prompt at every budget, with tokens/s and the size of the cache
    cat story.txt | python sample.py --prompt-file -
"""

import codecs
import sys
import time
from pathlib import Path

import torch

from train import Parser, load, pick_device, positive, token_bytes


def settings(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default=Path("out/checkpoint.pt"), type=Path, help="written by train.py")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--heads", default="", help="head budget, 1 to all, or a schedule of budget:tokens, * for the rest; by default all heads")
    one.add_argument("--compare", action="store_true", help="once at each budget the model was trained for")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--prompt", default="import ", help="text to continue")
    one.add_argument("--prompt-file", help="file with the text to continue; - for standard input")
    add("--tokens", default=400, type=positive, help="how many new tokens")
    add("--samples", default=1, type=positive, help="how many texts, in one batch")
    add("--temperature", default=0.8, type=float, help="0 always takes the most likely token")
    add("--top-k", default=40, type=positive, help="sample among this many most likely tokens")
    add("--top-p", default=1.0, type=float, help="and among the fewest that have this much probability together")
    add("--seed", default=0, type=int, help="the same seed gives the same text")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    return parser, parser.parse_args(argv)


def schedule(text, n):
    """A budget, or one for each of n new tokens: "12:64,4:*" is 64 times 12, then 4. None if text is empty."""
    parts = [part.split(":") for part in text.split(",")]
    try:
        if len(parts) == 1 and len(parts[0]) == 1:
            return int(text) if text else None
        budgets, counts = zip(*parts, strict=True)
        budgets, counts, last = [int(m) for m in budgets], [int(count) for count in counts[:-1]], counts[-1]
        counts.append(max(1, n - sum(counts)) if last == "*" else int(last))
        if min(counts) < 1 or max(map(len, parts)) > 2:
            raise ValueError
    except ValueError:
        raise ValueError(f"--heads {text} is neither a number of heads nor a schedule like 12:64,4:*") from None
    if sum(counts) != n:
        raise ValueError(f"--heads {text} says what to do for {sum(counts)} tokens, but there are {n}; end it with :*")
    return [m for m, count in zip(budgets, counts) for _ in range(count)]


def read_prompt(args):
    if args.prompt_file is None:
        return args.prompt
    try:
        return (sys.stdin.buffer if args.prompt_file == "-" else open(args.prompt_file, "rb")).read().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{args.prompt_file} is not UTF-8 text") from None


def write(text):
    """To the screen as it comes, as UTF-8 also where the terminal would rather not."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def sample(args):
    device = pick_device(args.device)
    model, encoding = load(args.checkpoint, device)
    model = model.bfloat16() if device.type == "cuda" else model                # half the bytes to read per token
    if device.type == "cpu" and sum(p.numel() for p in model.parameters()) < 1e7:
        torch.set_num_threads(1)                                                # a step is too short to be shared
    text = read_prompt(args)
    prompt = torch.tensor([encoding.encode_ordinary(text)] * args.samples, dtype=torch.long, device=device)
    for heads in model.config.budgets if args.compare else [schedule(args.heads, args.tokens)]:
        seeded = torch.Generator(device).manual_seed(args.seed)
        stream = model.stream(prompt, args.tokens, heads, args.temperature, args.top_k, args.top_p, seeded)
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompt]    # a character may span several tokens
        texts, times = [text] * args.samples, []
        if args.compare:
            write(f"--- {heads} heads ---\n")
        for i, tokens in enumerate(stream):
            times.append(time.perf_counter())
            if i == 0 and args.samples == 1:
                write(text)
            new = [decoder.decode(token_bytes(encoding, token)) for decoder, token in zip(decoders, tokens.tolist())]
            texts = [old + more for old, more in zip(texts, new)]
            if args.samples == 1:
                write(new[0])
        ends = [decoder.decode(b"", final=True) for decoder in decoders]
        write(ends[0] + "\n" if args.samples == 1 else "\n---\n".join(t + end for t, end in zip(texts, ends)) + "\n")
        if args.compare and len(times) > 2:                                     # the first steps read the prompt and warm up
            speed = args.samples * (len(times) - 2) / (time.perf_counter() - times[1])
            cache = model.new_cache(args.samples, 1).nbytes
            write(f"--- {heads} heads: {speed:,.0f} tokens/s, {cache:,} bytes of cache per token ---\n\n")


def main():
    parser, args = settings()
    parser.attempt(sample, args)


if __name__ == "__main__":
    main()
