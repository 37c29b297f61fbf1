"""Small random causal language models in fp32, and drafters that agree with them now and then."""

import copy

import torch
import transformers

VOCABULARY = 97
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "initializer_range": 0.3,
          "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 8}
PLAIN = {name: size for name, size in NARROW.items() if name != "head_dim"}
SHORT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
UNTIED = {"tie_word_embeddings": False}  # tied, a random model repeats one token
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
# What is decoded in tests/test_architectures.py alone: other attention, positions, norms, experts.
MORE_ARCHITECTURES = {
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON, **NARROW, **UNTIED, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**COMMON, **SHORT, intermediate_size=64),
    "gpt-j": lambda: transformers.GPTJConfig(**COMMON, n_embd=32, n_layer=3, n_head=4, rotary_dim=4),
    "phi": lambda: transformers.PhiConfig(**COMMON | {"initializer_range": 0.6}, **PLAIN),
    "phi3": lambda: transformers.Phi3Config(**COMMON, **PLAIN),
    "opt": lambda: transformers.OPTConfig(
        **COMMON, **SHORT, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3, dropout=0.0),
    "falcon": lambda: transformers.FalconConfig(**COMMON, **SHORT, **UNTIED),
    "falcon-alibi": lambda: transformers.FalconConfig(**COMMON, **SHORT, **UNTIED, alibi=True),
    "bloom": lambda: transformers.BloomConfig(**COMMON, **UNTIED, hidden_size=32, n_layer=3, n_head=4),
    "mpt": lambda: transformers.MptConfig(**COMMON, d_model=32, n_layers=3, n_heads=4, max_seq_len=128),
    "stablelm": lambda: transformers.StableLmConfig(**COMMON, **PLAIN),
    "cohere": lambda: transformers.CohereConfig(**COMMON, **PLAIN),
    "olmo2": lambda: transformers.Olmo2Config(**COMMON, **PLAIN),
    "starcoder2": lambda: transformers.Starcoder2Config(**COMMON, **PLAIN),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, **NARROW, num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **COMMON, **PLAIN | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **COMMON, **NARROW, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, rope_parameters=None),
}
# What keeps a state that no rejected token can be taken out of, or reads its prompt in an encoder.
REFUSED_ARCHITECTURES = {
    "mamba": lambda: transformers.MambaConfig(**COMMON, hidden_size=16, num_hidden_layers=2, state_size=4),
    "jamba": lambda: transformers.JambaConfig(
        **COMMON, **PLAIN, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4),
    "recurrent-gemma": lambda: transformers.RecurrentGemmaConfig(
        **COMMON, **NARROW, attention_window_size=16, lru_width=32),
    "rwkv": lambda: transformers.RwkvConfig(**COMMON, hidden_size=32, num_hidden_layers=2),
    "t5": lambda: transformers.T5Config(**COMMON, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2),
}


def tiny_model(architecture="llama", seed=0, **changes):
    """A model with random weights, the same for the same seed."""
    config = (ARCHITECTURES | MORE_ARCHITECTURES | REFUSED_ARCHITECTURES)[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return kind.from_config(config).float().eval()


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
