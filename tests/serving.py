"""What serve_vllm.py, serve_llama_cpp.py and serve_mlx.py share: our model beside another program.

A model that is trained a little repeats itself, and so agrees with a program that gets much wrong.
Hence models of random weights, whose text varies, and log-probabilities beside tokens.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch

from common import Table, heads_of, load, save
from export import export
from matmla import GPT, Config

PROMPTS = "import ", "def add(a, b):\n    return", "The cat sat on the"
NEW = 40  # greedy tokens after each
RANDOM = [
    *[("matmla", heads) for heads in ("12", "8", "4", "12/12/8/4/4")],
    ("gqa", "12"),
    ("nested_gqa", "6"),
    ("nested_mha", "4"),
]


def random_checkpoint(path, **sizes):
    """A checkpoint of random weights, with GPT-2's tokens."""
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=50257, **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0 if p.dim() == 2 else 1, std=0.15)
    state = dict(config=vars(model.config), model=model.state_dict(), encoding="gpt2")
    save(path, settings={}, step=0, optimizers=[], log=[], **state)


@torch.no_grad()
def compare(checkpoint, heads, program, serve):
    """Export and serve a model at these heads. A row of what came out, and whether it is right.

    serve(folder, prompts): for each prompt the NEW tokens that the program finds most likely, and
    their log-probabilities, or None where it does not say: a list of pairs of lists.
    """
    model, encoding = load(checkpoint, "cpu")
    prompts = [encoding.encode_ordinary(text) for text in PROMPTS]
    with TemporaryDirectory() as folder:
        out = Path(folder, "exported")
        export(SimpleNamespace(checkpoint=checkpoint, heads=heads, program=program, out=out))
        answers = serve(out, prompts)

    same, different, apart = 0, set(), []
    for prompt, (tokens, log_probs) in zip(prompts, answers, strict=True):
        ours = model.generate(torch.tensor([prompt]), NEW, heads_of(heads), temperature=0)[0]
        same += sum(a == b for a, b in zip(ours[len(prompt) :].tolist(), tokens, strict=True))
        different |= {*tokens}

        # Ours of the tokens of the other program, so that one early difference is not all.
        logits = model(torch.tensor([prompt + tokens]), heads=heads_of(heads))[0][0]
        right = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor([tokens]).T)
        pairs = zip(right[:, 0].tolist(), log_probs, strict=True)
        apart += [abs(a - b) for a, b in pairs if b is not None]
    apart = torch.tensor(apart).max().item()
    row = {
        "model": f"{model.config.attention} of {checkpoint.name}",
        "heads": heads,
        "tokens like ours": f"{same} of {NEW * len(prompts)}",
        "different tokens": len(different),
        "log-probabilities differ by": f"{apart:.0e}",
    }
    return row, same == NEW * len(prompts) and apart < 1e-3


def check(program, serve, checkpoints):
    """Compare RANDOM models, and those of checkpoints. Exit status 1 if there is a difference."""
    found = []
    with TemporaryDirectory() as folder:
        for attention, heads in RANDOM:
            path = Path(folder, "random.pt")
            random_checkpoint(path, attention=attention)
            found.append(compare(path, heads, program, serve))
    for path in checkpoints:
        budgets = load(path, "cpu")[0].config.budgets
        found += [compare(path, str(m), program, serve) for m in budgets]

    table = Table()
    for row, _ in found:
        table.add(row)
    right = all(right for _, right in found)
    print("\nall the same" if right else "\nNOT the same")
    sys.exit(0 if right else 1)


def add_checkpoints(parser):
    parser.add_argument("checkpoints", type=Path, nargs="*", help="served beside random models")
