"""
Reads a pretrained model with transformers: a folder, a .gguf file, or one on the Hugging Face hub.
What our models cannot do is refused by name, not left out.
"""

import json
from pathlib import Path

import gguf
import torch
import transformers

from tokenizer import UserError, explained, get_encoding

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "tekken.json",
)


def obstacles(c):
    """By name, what a config of transformers asks for that our models do not have."""
    rope = getattr(c, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    window = getattr(c, "sliding_window", None)
    activation = getattr(c, "hidden_act", None)
    experts = getattr(c, "num_experts_per_tok", 2)
    asked = {
        f"the architecture {c.model_type}": c.model_type
        not in ("llama", "mistral", "mixtral", "qwen2", "qwen3"),
        f"RoPE scaling ({rope_type})": rope_type not in ("default", "linear", "llama3"),
        "RoPE on a part of each head": rope.get("partial_rotary_factor", 1) != 1,
        f"a sliding window of {window} tokens": window and window < c.max_position_embeddings,
        f"{experts} experts per token in place of 2": experts != 2,
        f"the activation {activation}": activation != "silu",
        "attention_bias": getattr(c, "attention_bias", False),
        "mlp_bias": getattr(c, "mlp_bias", False),
    }
    return [what for what in asked if asked[what]]


def gguf_settings(reader):
    """What a .gguf file says of the model: llama.block_count, say, under the name block_count."""
    family = reader.fields["general.architecture"].contents() + "."
    return {
        key.removeprefix(family): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(family)
    }


def gguf_obstacles(c, reader):
    """By name, what a .gguf file says of the model, and transformers silently leaves in it."""
    family = reader.fields["general.architecture"].contents()
    read = transformers.integrations.GGUF_CONFIG_MAPPING[family]
    d_h = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    allowed = {
        "attention.key_length": [d_h],
        "attention.value_length": [d_h],
        "rope.dimension_count": [d_h],
        "rope.scaling.type": ["none", "linear"],
    }
    settings = gguf_settings(reader)
    settings.pop("rope.scaling.factor", None)  # for `scale_rope`
    found = [
        f"{key} = {value}"
        for key, value in settings.items()
        if not read.get(key) and value not in allowed.get(key, [])
    ]

    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(c)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], c.num_hidden_layers)
    known = {names.get_name(name, (".weight", ".bias")) for name, _ in theirs.named_parameters()}
    known.add("rope_freqs.weight")  # for `scale_rope`
    return found + [f"the weight {t.name}" for t in reader.tensors if t.name not in known]


def scale_rope(theirs, reader):
    """Give transformers' model the frequencies of RoPE that a .gguf file asks for.

    llama.cpp divides all of them by rope.scaling.factor, unless the type of scaling is "none", and
    each by its own number in rope_freqs.weight, which Llama 3 has. transformers reads neither.
    """
    settings = gguf_settings(reader)
    frequencies = theirs.model.rotary_emb.inv_freq
    if settings.get("rope.scaling.type") != "none":
        frequencies /= settings.get("rope.scaling.factor", 1.0)
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            frequencies /= torch.tensor(tensor.data)


def read_pretrained(name):
    """(transformers' model in float32, its tokenizer as checkpoints have it, or None).

    UserError if the files cannot be read, or if the model cannot be ours: it names the reasons.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = Path(name)
    reader = None
    where = {"pretrained_model_name_or_path": name, "trust_remote_code": False}

    with explained(f"cannot use the config of {name}"):
        if path.suffix == ".gguf":
            reader = gguf.GGUFReader(path)
            where |= {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        c = transformers.AutoConfig.from_pretrained(**where)
    found = obstacles(c)
    if reader and not found:
        found = gguf_obstacles(c, reader)
    if not found:
        with explained(f"cannot use the tokenizer of {name}"):
            encoding = own_tokenizer(name, where, c)
        with explained(f"cannot use the weights of {name}"):
            theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, output_loading_info=True
            )
        found = [f"a model without {key}" for key in sorted(info["missing_keys"])]
        found += [f"the weight {key}" for key in sorted(info["unexpected_keys"])]
    if found:
        raise UserError(f"cannot convert {name}, not supported: {', '.join(found[:3])}")
    if reader:
        scale_rope(theirs, reader)
    return theirs.eval(), encoding


def own_tokenizer(name, where, c):
    """What get_encoding takes for the model's own tokenizer; None if there is none.

    It raises whatever a library raises, and ValueError for tokens that the model does not have.
    """
    has_file = transformers.utils.has_file
    if "gguf_file" not in where and not any(has_file(name, file) for file in TOKENIZERS):
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [
        token
        for token in content["added_tokens"]  # special ones that the model has no vector for
        if token["id"] < c.vocab_size or not token["special"]
    ]
    end = c.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if isinstance(end, list):
        end = end[0]
    encoding = {"json": json.dumps(content), "eot_token": end}

    ours = get_encoding(encoding)
    for token in (ours.n_vocab - 1, end, *ours.front):
        if token not in range(c.vocab_size):
            raise ValueError(
                f"its token {token} is not in the embedding of {c.vocab_size} "
                "(None: no end of text)"
            )
    return encoding
