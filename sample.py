"""
Continue a prompt with a trained model, with any number of heads.

    python sample.py --heads 4 --prompt "class Tree:"
    python sample.py --heads 12/12/8/4/4     a number for each layer, the first layer's first
    python sample.py --heads "12:64,4:*"     64 new tokens with 12 heads, the rest with 4
    python sample.py --compare               at every budget, with speed and size of the cache
    python sample.py --prompt "$(cat story.txt)"
"""

import time
from pathlib import Path

import torch

from common import Parser, heads_of, load, positive, user_input
from decode import fast
from devices import pick_device
from matmla import sample
from tokenizer import TextStream, UserError


def read_heads(text, n, model):
    """--heads for n new tokens, as keywords of GPT.stream: heads, or a schedule for "12:64,4:*".

    ValueError if it is neither, for more or fewer tokens, or for heads that the model has not.
    """
    if ":" not in text:
        model.layer_heads(heads_of(text), 1)
        return {"heads": heads_of(text)}

    schedule = []
    for part in text.split(","):
        heads, _, count = part.partition(":")
        left = n - len(schedule)
        if count == "*":
            count = str(left)
        if not count.isdecimal() or int(count) > left:
            raise UserError(
                f"--heads {text}: {part} must be heads:tokens, with at most {left} tokens"
            )
        model.layer_heads(heads_of(heads), 1)
        schedule += [heads_of(heads)] * int(count)
    if len(schedule) < n:
        raise UserError(f"--heads {text} is for {len(schedule)} tokens, but --tokens is {n}")
    return {"schedule": schedule}


def write_samples(args):
    """Write the prompt and its continuation, with --compare once at each budget."""
    device = pick_device(args.device)
    model, encoding = load(args.checkpoint, device)
    if device.type == "cuda":
        fast(model.bfloat16())  # half of the bytes to read for a token
    elif sum(p.numel() for p in model.parameters()) < 1e7:
        torch.set_num_threads(1)  # a step is too short to be shared

    # What cannot be is refused here, before anything is written.
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    choices = [{"heads": m} for m in model.config.budgets]
    with user_input():
        args.prompt.encode()  # what a command line has in another encoding is no text
        sample(torch.zeros(1, 1), **sampling)
        if not args.compare:
            choices = [{} if args.heads == "all" else read_heads(args.heads, args.tokens, model)]
    prompt = torch.tensor([encoding.encode_ordinary(args.prompt)], dtype=torch.long, device=device)
    if prompt.numel() == 0:
        raise UserError("--prompt has 0 tokens to continue")

    for choice in choices:
        print(args.prompt, end="", flush=True)
        sampling["generator"] = torch.Generator(device).manual_seed(args.seed % 2**63)
        text = TextStream(encoding)
        for i, token in enumerate(model.stream(prompt, args.tokens, **choice, **sampling)):
            if i < 2:  # the first two read the prompt and warm up
                began = time.perf_counter()
            print(text.step(token.item()), end="", flush=True)
        seconds = time.perf_counter() - began
        print(text.end())
        if args.compare and args.tokens > 2:
            print(
                f"--- {choice['heads']} heads: {(args.tokens - 2) / seconds:,.0f} tokens/s, "
                f"{model.new_cache(1, 1).nbytes:,} bytes of cache per token ---\n"
            )


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default=Path("out/checkpoint.pt"), type=Path, help="written by train.py")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--heads", default="all", help="how many, or as above")
    one.add_argument("--compare", action="store_true", help="once at each budget of the model")
    add("--prompt", default="import ", help="text to continue")
    add("--tokens", default=400, type=positive, help="how many new tokens")
    add("--temperature", default=0.8, type=float, help="0 always takes the most likely token")
    add("--top-k", default=40, type=positive, help="choose among so many most likely tokens")
    add("--top-p", default=1.0, type=float, help="and the fewest with this probability together")
    add("--seed", default=0, type=int, help="the same seed gives the same text")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there")
    parser.run(write_samples, parser.parse_args())


if __name__ == "__main__":
    main()
