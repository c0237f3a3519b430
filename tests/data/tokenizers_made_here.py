"""Small tokenizers built on the spot, and chat templates in the manner of the families we train."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "</s>",
]
TEXT = [
    "The quick brown fox jumps over the lazy dog. What color is the sky? It is blue.",
    "Why? Because of the air.",
    "user assistant system tool You are a helpful assistant. one two three\n\nfour five\nsix. 1 + 2 = 3",
    "<think>\nLet me see.\n</think>\n\nThe answer is 42.",
]

# ChatML with a default system message, as SmolLM2's template has it.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "GENERATION{{ message['content'] + '<|im_end|>' + '\n' }}ENDGENERATION{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3: trimmed contents, a first token, nothing after the end of turn.
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "GENERATION{{ message['content'] | trim + '<|eot_id|>' }}ENDGENERATION{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No special tokens around the turns but the end, and roles that must alternate.
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n### User:\n' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n### Answer:\n' }}"
    "GENERATION{{ message['content'] + eos_token }}ENDGENERATION"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n### Answer:\n' }}{% endif %}"
)
# Qwen3: thoughts are shown in the last turn only, an empty one added where there is none.
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "GENERATION{% if message['role'] == 'assistant' and loop.last %}{% if '</think>' in message['content'] %}"
    "{{ message['content'] }}{% else %}{{ '<think>\n\n</think>\n\n' + message['content'] }}{% endif %}"
    "{% else %}{{ message['content'].split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "{{ '<|im_end|>\n' }}ENDGENERATION{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN, "qwen3": QWEN3}


def unmarked(template: str) -> str:
    return template.replace("ENDGENERATION", "").replace("GENERATION", "")


def marked(template: str) -> str:
    """The template with `{% generation %}` marks around what an assistant writes: the expected masks."""
    end = "{% endgeneration %}{% endif %}"
    text = template.replace("ENDGENERATION", "@@")
    head, *rest = text.split("GENERATION")
    body, tail = "GENERATION".join(rest).split("@@")
    return (
        f"{head}{{% if message['role'] == 'assistant' %}}{{% generation %}}{body}{end}"
        f"{{% if message['role'] != 'assistant' %}}{body}{{% endif %}}{tail}"
    )


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def make_tokenizer(template: str | None = None, eos_token: str | None = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose special tokens are those of ChatML and Llama 3."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token=eos_token,
        bos_token="<|begin_of_text|>",
        chat_template=template,
    )
