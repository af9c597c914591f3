"""The tiny tokenizers that encoding is tested with."""

from tests.texts.conftest import chat_tokenizer, decoder_tokenizer, encoder_tokenizer

__all__ = ["chat_tokenizer", "decoder_tokenizer", "encoder_tokenizer"]
