"""Make token sequences of text: of the packaged texts, and of files of the user.

This module knows nothing of routers. Two empty lines separate the documents of a text. Documents
are tokenised one by one and packed one after the other, so a sequence may hold the end of one
document and the beginning of the next.

    text = read_texts(["book.txt"])
    ids = pack(tokenizer, text, length=1024)        # LongTensor [n, 1024]
"""

from collections.abc import Sequence
from pathlib import Path

from mod_export.errors import UserError

TEXTS = Path(__file__).parent.parent / "assets/texts"
# The end with which a document is tokenised.
END = "\n\n"


def default_texts() -> tuple[str, str]:
    """Return the packaged calibration text and the packaged held-out text.

    Source: texts/README.md; both texts are CC0.
    """
    return read_texts([TEXTS / "calibration.txt"]), read_texts([TEXTS / "heldout.txt"])


def read_texts(paths: Sequence[str | Path]) -> str:
    """Return the contents of UTF-8 text files, one after the other.

    Raises UserError naming the file that cannot be read.
    """
    parts = []
    for path in paths:
        try:
            parts.append(Path(path).read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as exc:
            raise UserError(f"{path} is not UTF-8 text", "give plain text files") from exc
        except OSError as exc:
            raise UserError(f"cannot read {path}: {exc.strerror}", "check the path") from exc
    return "\n\n\n".join(part.strip("\n") for part in parts)


def tokenize(tokenizer, text: str) -> list[int]:
    """Return the token ids of `text`, without special tokens.

    Documents are tokenised one by one, so that the cost stays linear in the length.
    """
    documents = [doc.strip("\n") for doc in text.split("\n\n\n")]
    ids: list[int] = []
    for doc in filter(None, documents):
        ids += tokenizer(doc + END, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def same_tokens(first, second) -> bool:
    """Return whether two tokenizers give the same ids for a text that tells tokenizers apart.

    The text has words, numbers, spaces, another script and a special token.
    """
    text = "The keeper's 3 lamps, 27 stairs and 1840 steps:\n\n\t* naïve 東京 <|im_end|>"
    made = [tokenizer(text, verbose=False)["input_ids"] for tokenizer in (first, second)]
    return made[0] == made[1]


def pack(tokenizer, text: str, length: int, count: int | None = None, least: int | None = None):
    """Cut `text` into sequences of `length` tokens, LongTensor [n, length] with n >= 1.

    A remainder is dropped. Each sequence begins with the beginning token (bos) where the model
    expects one. count: the number of sequences to keep, spread evenly over the text. least:
    take what is there, fewer than `count` or a single one of at least so many tokens. Raises
    UserError where the text is too short for that.
    """
    import torch

    begin = bos(tokenizer)
    ids = tokenize(tokenizer, text)
    body = length - len(begin)
    if least is not None:
        body = max(min(body, len(ids)), least - len(begin))
        count = min(count or len(ids), max(1, len(ids) // body))
    available = len(ids) // body
    if available < (count or 1):
        need = (count or 1) * body
        raise UserError(
            f"text too short: {len(ids)} tokens where {need} are needed", "give more text"
        )
    chosen = range(available) if count is None else [i * available // count for i in range(count)]
    return torch.tensor([begin + ids[i * body : (i + 1) * body] for i in chosen])


def bos(tokenizer) -> list[int]:
    """Return the beginning token in a list, which is empty where the tokenizer puts none."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return first if first and first == [tokenizer.bos_token_id] else []


def begun(tokenizer, ids: list[int]) -> list[int]:
    """Return `ids` with the beginning token, which some chat templates have written already."""
    begin = bos(tokenizer)
    return ids if ids[: len(begin)] == begin else begin + ids
