"""A tokenizer with one token per byte and a text for it, for tests of tiny models."""

TEXT = " ".join(f"Line {i}: {i * 7919 % 97} red hens ate {i % 13} worms near gate {i * i % 31}." for i in range(170))


def byte_tokenizer():
    """One token per byte, 256 in all: a real tokenizer that needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)
