"""Two tiny tokenizers: an encoder's, with start, separator and mask tokens; a decoder's, whose pad is its end."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(40)]


def _word_level(special: list[str], unknown: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture
def encoder_tokenizer():
    tokenizer = _word_level(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def decoder_tokenizer():
    special = ["<unk>", "<end>", "<user>", "<assistant>", "<system>", "Answer:"]
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(special, "<unk>"), pad_token="<end>", eos_token="<end>", unk_token="<unk>"
    )


@pytest.fixture
def chat_tokenizer(decoder_tokenizer):
    decoder_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return decoder_tokenizer
