"""
Continue a prompt with a trained model at any head budget.

    python sample.py --heads 4 --prompt "class Tree:"
"""

import codecs
from pathlib import Path

import torch

from train import Parser, load, pick_device, token_bytes


def settings(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default=Path("out/checkpoint.pt"), type=Path, help="written by train.py")
    add("--heads", type=int, help="head budget, 1 to all; by default all")
    add("--prompt", default="import ", help="text to continue")
    add("--tokens", default=400, type=int, help="how many new tokens")
    add("--temperature", default=0.8, type=float, help="0 always takes the most likely token")
    add("--top-k", default=40, type=int, help="sample among this many most likely tokens")
    add("--seed", default=0, type=int, help="the same seed gives the same text")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    args = parser.parse_args(argv)
    for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 1)):
        if not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, the least is {least}")
    return parser, args


def main():
    parser, args = settings()
    parser.attempt(sample, args)


def sample(args):
    device = pick_device(args.device)
    model, encoding = load(args.checkpoint, device)
    prompt = torch.tensor([encoding.encode_ordinary(args.prompt)], dtype=torch.long, device=device)
    seeded = torch.Generator(device).manual_seed(args.seed)
    stream = model.stream(prompt, args.tokens, args.heads, args.temperature, args.top_k, seeded)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")                  # a character may span several tokens
    text = args.prompt
    for token in stream:
        print(text, end="", flush=True)
        text = decoder.decode(token_bytes(encoding, token.item()))
    print(text + decoder.decode(b"", final=True))


if __name__ == "__main__":
    main()
