"""Tiny real tokenizers: byte-level BPE trained on a few lines, with special tokens."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = ["How many apples? 42 apples.", "the answer is the sum of the numbers", "aab aab aab"] * 4

# ids 0, 1, 2 are <s>, </s>, <pad>; 3 and 4 open and close a turn; 5 to 260 are the bytes
SPECIAL = ["<s>", "</s>", "<pad>", "<turn>", "<end>"]

CHAT = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# renders a thought before the last answer only, as reasoning models do
CHANGING = CHAT.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}(thought){% endif %}{{ m.content }}",
)
STRICT = "{{ raise_exception('no such conversation') }}"


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    *, add_bos: bool = False, add_eos: bool = False, eos: bool = True, chat: str | None = None
) -> PreTrainedTokenizerFast:
    """add_bos, add_eos: by itself, as Llama and T5 do; eos=False: it has no EOS at all."""
    tokenizer = Tokenizer.from_str(_trained())
    if add_bos or add_eos:
        single = "<s> " * add_bos + "$A" + " </s>" * add_eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    special = {"bos_token": "<s>", "pad_token": "<pad>"} | ({"eos_token": "</s>"} if eos else {})
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = chat
    return made
