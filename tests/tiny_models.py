"""Small random causal language models in fp32, and drafters that agree with them now and then."""

import copy

import torch
import transformers

VOCABULARY = 97
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "initializer_range": 0.3,
          "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, **NARROW),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, **NARROW),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, **NARROW),
    "mistral": lambda: transformers.MistralConfig(**COMMON, **NARROW, sliding_window=None),
    "gpt2": lambda: transformers.GPT2Config(**COMMON, n_embd=32, n_layer=3, n_head=4),
    "gemma": lambda: transformers.GemmaConfig(**COMMON, **NARROW),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, **NARROW, sliding_window=8),  # every second layer slides
    "mistral-sliding": lambda: transformers.MistralConfig(**COMMON, **NARROW, sliding_window=8),
}


def tiny_model(architecture="llama", seed=0, **changes):
    """A model with random weights, the same for the same seed."""
    config = ARCHITECTURES[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def noisy_copy(model, noise=0.03, seed=1):
    """The same model with noise on its weights: a drafter whose tokens are sometimes accepted."""
    drafter = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return drafter


def prompt_ids(length=6, seed=0):
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
