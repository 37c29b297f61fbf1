"""A tokenizer of a hundred words with a chat template, made in memory."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
            "{% if add_generation_prompt %}<|assistant|> {% endif %}")
SPECIAL = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>"]


def tiny_tokenizer(size=97):
    words = SPECIAL + [f"w{i}" for i in range(size - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>",
                                   additional_special_tokens=SPECIAL[1:3], chat_template=TEMPLATE)
