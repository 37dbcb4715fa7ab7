"""A tokenizer with one token per byte and a text for it, for tests of tiny models."""

TEXT = " ".join(
    f"Line {i}: {i * 7919 % 97} red hens ate {i % 13} worms near gate {i * i % 31}."
    for i in range(170)
)


def byte_tokenizer():
    """Return a real tokenizer that needs no file, with one token per byte, 256 in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def with_bos(tokenizer):
    """Return the tokenizer, which now begins what it makes with the token <s>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer
