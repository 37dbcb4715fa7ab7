"""The tokenizer of a GGUF file, built from the keys tokenizer.ggml.*.

    tokenizer = read_tokenizer(GGUFFile.open("model.gguf"))     # gives llama.cpp's ids
    tokenizer.save_pretrained("model")

transformers builds one too, but takes only some of the keys and of the pre-tokenizers. Source of
what the keys mean: src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from mod_export.errors import UserError
from mod_export.formats.gguf import GET_AGAIN, GGUFFile

# tokenizer.ggml.token_type: enum llama_token_type of include/llama.h
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPACE = "\u2581"  # SentencePiece writes a space so

# --- how byte-level vocabularies cut a text into words, by tokenizer.ggml.pre
# Each pattern is tried on the pieces that the ones before it left. What a pattern matches is a
# piece, and so is what lies between two matches.

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SYMBOLS_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_ASCII_SYMBOLS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _cased(ending: str) -> str:
    """Words that begin with capitals, and words that end with small letters."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"


_LLAMA3 = f"{_ENDINGS}|{_WORD}|\\p{{N}}{{1,3}}{_SYMBOLS}{_LINES}"
_QWEN2 = f"{_ENDINGS}|{_WORD}|\\p{{N}}{_SYMBOLS}{_LINES}"
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-"
    "ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭ"
    "ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN_HANGUL = "[一-龥ࠀ-一가-퟿]+"

SPLITS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0")
    + ("mellum", "modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"): (
        _GPT2,
    ),
    (
        "smollm",
        "starcoder",
        "refact",
        "command-r",
        "codeshell",
        "exaone",
        "minerva-7b",
        "mellum2",
    ): (
        r"\p{N}",
        _GPT2,
    ),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
    + ("jina-v5-nano", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5"): (_LLAMA3,),
    ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan")
    + ("solar-open", "grok-2"): (_QWEN2,),
    ("qwen35",): (
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_LINES}",
    ),
    ("ufakzeka",): (rf"{_WORD}|\p{{N}}{_SYMBOLS}{_LINES}",),
    ("minicpm5",): (r"\p{N}{1,3}", rf"{_ENDINGS}|{_WORD}|\p{{N}}+{_SYMBOLS}{_LINES}"),
    ("seed-coder",): (rf"{_ENDINGS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_LINES}",),
    ("bailingmoe", "bailingmoe2", "llada-moe"): (
        rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    ("tekken",): (_cased("") + r"|\p{N}" + _SYMBOLS_SLASH + _LINES,),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"): (
        _cased(_ENDINGS + "?") + r"|\p{N}{1,3}" + _SYMBOLS_SLASH + _LINES,
    ),
    ("falcon",): (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ("deepseek-llm",): (
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+\z",
        _HAN_HANGUL,
        r"\p{N}+",
    ),
    ("deepseek-coder",): (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}"),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        rf"{_ASCII_SYMBOLS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_LINES}",
    ),
    ("poro-chat", "bloom", "gpt3-finnish"): (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    ("viking",): (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"),
}
# A word that is a token as a whole is not built from merges.
WHOLE_WORDS = (
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken "
    "minicpm5 glm4 glm5"
).split()
# The vocabularies that begin a text with BOS where no key says otherwise.
BEGIN_WITH_BOS = (
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken"
).split()
# Models, by their name, whose control tokens take the spaces after them: no key says so.
SPACE_SWALLOWERS = ("phi-3", "phi3")
SPECIAL_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
USE_DIRECTORY = "convert the model's Hugging Face directory instead"


def read_tokenizer(file: GGUFFile):
    """Build the tokenizer of a file, as a transformers PreTrainedTokenizerFast.

    Raises UserError for a file without a vocabulary, and for a kind of vocabulary or pre-tokenizer
    that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = list(_value(file, "tokens", ()))
    if not tokens:
        raise UserError(f"{file.path} has no tokenizer", "give a file that has one")
    kind = _value(file, "model")
    if kind == "gpt2":
        backend, begin = _byte_level(file, tokens)
    elif kind == "llama":
        backend, begin = _sentence_piece(file, tokens), True
    else:
        raise UserError(f"{file.path} has a vocabulary of kind {kind!r}", USE_DIRECTORY)
    _add_named_tokens(backend, file, tokens)
    names = {f"{name}_token": _token(file, tokens, key) for name, key in SPECIAL_NAMES.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token for name, token in names.items() if token is not None},
        add_bos_token=bool(_value(file, "add_bos_token", begin)) and "bos_token" in names,
        add_eos_token=bool(_value(file, "add_eos_token", False)),
        add_prefix_space=bool(_value(file, "add_space_prefix", kind == "llama")),
        chat_template=file.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        name_or_path=str(file.path),
    )


def _value(file: GGUFFile, name: str, default=None):
    return file.get(f"tokenizer.ggml.{name}", default)


def _token(file: GGUFFile, tokens: list[str], name: str) -> str | None:
    number = _value(file, f"{name}_token_id")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """A vocabulary of byte-level BPE, and whether BOS begins a text by default."""
    pre = _value(file, "pre", "default")
    patterns = next((split for names, split in SPLITS.items() if pre in names), None)
    if patterns is None:
        raise UserError(f"{file.path} has the unknown pre-tokenizer {pre!r}", USE_DIRECTORY)
    merges = [_merge(entry) for entry in _value(file, "merges", ())]
    vocab = {token: number for number, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS)
    except Exception as error:  # tokenizers raises no narrower class
        raise UserError(
            f"{file.path} has merges that do not fit its vocabulary ({error})", GET_AGAIN
        ) from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre in BEGIN_WITH_BOS


def _merge(entry: str) -> tuple[str, str]:
    """The two parts of a merge; the first may itself begin with a space."""
    cut = entry.find(" ", 1)
    return entry[:cut], entry[cut + 1 :]


def _sentence_piece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """A SentencePiece vocabulary, whose scores say which tokens are merged first."""
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(
            vocab,
            merges_of_scores(vocab, _value(file, "scores", ())),
            unk_token=_token(file, tokens, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    if _value(file, "add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _value(file, "add_space_prefix", True):
        back.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(back)
    return backend


def merges_of_scores(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to merge two tokens to a third, those with the best score first."""
    if len(scores) < len(vocab):
        raise UserError("the vocabulary has no scores", USE_DIRECTORY)
    order = sorted(vocab.items(), key=lambda item: (-scores[item[1]], item[1]))
    return [
        (token[:cut], token[cut:])
        for token, _ in order
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]


def _add_named_tokens(backend: Tokenizer, file: GGUFFile, tokens: list[str]) -> None:
    """Tokens that a text names as a whole: control tokens, and those that a user defined."""
    swallow = any(name in str(file.get("general.name", "")).lower() for name in SPACE_SWALLOWERS)
    named = [
        AddedToken(
            token,
            special=type != USER_DEFINED,
            normalized=False,
            rstrip=swallow and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, type in zip(tokens, _value(file, "token_type", ()), strict=False)
        if type in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]
    backend.add_tokens(named)
