"""Texts on which two tokenizers of one vocabulary are compared.

    found = difference(one.encode, other.encode)
    if found: print(found.show(tokens))

Each text asks for a rule that tokenizers differ in: how digits are grouped, which spaces belong to
the next word, where a line break ends a piece, what a combining mark belongs to, which names are
special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

PROBE_TEXTS = (
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t\n",
    "\r\n",
    "a\r\nb\r\n\r\nc",
    " a",
    "  a",
    "   a b",
    "a ",
    "a  ",
    "a \n",
    "a\n b",
    "a \n\n b",
    "a\n\n\n  b\n",
    "\ta\t\tb",
    "\u00a0a\u00a0\u00a0b",
    "Hello world",
    " Hello world",
    "Hello  World",
    "Hello, y'all! How are you?",
    "HELLO'LL hello'Ll I'VE we'd it's 's '",
    "camelCaseWord XMLHttpRequest iPhone McDonald",
    "1 12 123 1234 12345 123456 1234567",
    "3.14159, 1,000,000 and 2e-10",
    " 7 77 777 7777",
    "x1 x12 1x 12x a1b2c3",
    "\u0661\u0662\u0663\u0664 \u0967\u0968\u0969 \u00b2\u00b3\u00bd \u2167 \uff11\uff12\uff13",
    "!!! ??? ... --- === ###",
    "(a) [b] {c} <d> \"e\" 'f' `g`",
    "a+b=c; a<b>c; a^b~c|d $5 \u20ac5 5%",
    "!a .b ,c _d @e #f",
    "end. Next",
    "http://example.org/a?b=1&c=%20d#e",
    "def f(x):\n    return x ** 2  # square\n\n\nprint(f(3))\n",
    "\tif (a != b) {\n\t\treturn NULL;\n\t}\n",
    '{"key": [1, 2.5, null], "other": "\\n\\t\\u00e9"}',
    "C\u1eeda Vi\u1ec7t, Ti\u1ebfng Vi\u1ec7t",
    "Cu\u031b\u0309a Vie\u0323\u0302t",
    "na\u00efve caf\u00e9 e\u0301te\u0301 \u00c5ngstr\u00f6m \u00fcber stra\u00dfe",
    "Съешь ещё этих булок",
    "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u6211\u4eec2024\u5e74\u89c1\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u3001\u30c6\u30ad\u30b9\u30c8\u30fc\u6f22\u5b57",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "مرحبا بالعالم م\u064eر\u0652ح\u064eب",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f",
    "გამარჯობა Հայաստան",
    "\U0001f680 \U0001f44d\U0001f3fd \u2764\ufe0f \U0001f1e9\U0001f1ea",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "a\u200bb\u200dc\ufeffd\u2028e\u3000f",
    "\u201cquoted\u201d \u2018it\u2019s\u2019 \u2014 dash \u2026 \u2022 item",
    "\U0001d49c\U0001d4b7 \U00010348 \u2202x/\u2202t \u2260 \u2211\u221e",
    "\x01\x02 \x1b[0m \x7f",
    "[INST] <|no such name|> <0x0A> {{ x }}",
    "\u2581a \u2581\u2581b \u0120c \u010a",
)


def special_texts(names: Sequence[str], count: int = 4) -> list[str]:
    """Texts with some of the names of a vocabulary's control tokens, between words and spaces."""
    step = max(1, len(names) // count)
    return [
        f"{start}{name}{end}"
        for name in names[::step][:count]
        for start, end in (("", ""), ("one", "two\n"), ("one ", "  two"), ("\n", f"\n{name} "))
    ]


@dataclass(frozen=True)
class Difference:
    """A text that two tokenizers cut differently, and the ids that both give."""

    text: str
    ours: list[int]
    theirs: list[int]

    def show(self, tokens: Sequence[str]) -> str:
        """One line with the text and both lists of tokens, from just before they part.

        tokens: the vocabulary.
        """
        pairs = zip(self.ours, self.theirs, strict=False)
        parted = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if parted is None:
            parted = min(len(self.ours), len(self.theirs))
        start = max(0, parted - 1)
        lists = [
            " ".join(tokens[i] if 0 <= i < len(tokens) else f"#{i}" for i in ids[start : start + 6])
            for ids in (self.ours, self.theirs)
        ]
        return f"of {self.text!r} they make [{lists[0]}] and [{lists[1]}]"


def difference(
    ours: Callable[[str], Sequence[int]],
    theirs: Callable[[str], Sequence[int]],
    texts: Iterable[str] = PROBE_TEXTS,
) -> Difference | None:
    """The first text of which the two functions make different ids."""
    for text in texts:
        one, other = list(ours(text)), list(theirs(text))
        if one != other:
            return Difference(text, one, other)
    return None
