"""A tokenizer to save, and templates as published ones are, for the tests of chats."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

R1_INFERENCE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# What DeepSeek and Qwen document of their templates, each in its fewest words: how the answer is opened in each mode.
BARE = R1_INFERENCE.replace("<|assistant|><think>\n{% endif %}", "<|assistant|>{% endif %}")  # R1's first release
V3_1 = R1_INFERENCE.replace(
    "<|assistant|><think>\n{% endif %}",
    "<|assistant|>{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}{% endif %}",
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QUESTION = [{"role": "user", "content": "1 + 1?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "<think>\ntwo\n</think>\n\n2"}]


def save_tokenizer(directory: Path, template: str | None) -> Path:
    """A byte-level tokenizer with ChatML's tokens, in a directory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|bos|>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory
