"""
mlx-lm beside our own model: greedy tokens and their log-probabilities.

    pip install mlx-lm      (on Linux: pip install --no-deps mlx-lm mlx mlx-cpu)
    python -m tests.serve_mlx out/checkpoint.pt
"""

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from common import Parser
from tests.serving import NEW, add_checkpoints, check


def serve(folder, prompts):
    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    answers = []
    for prompt in prompts:
        steps = list(generate_step(mx.array(prompt), model, max_tokens=NEW))
        tokens = [int(token) for token, _ in steps]
        answers.append((tokens, [log_probs[token].item() for token, log_probs in steps]))
    return answers


def main():
    parser = Parser(__doc__)
    add_checkpoints(parser)
    args = parser.parse_args()
    parser.run(check, "transformers", serve, args.checkpoints)


if __name__ == "__main__":
    main()
