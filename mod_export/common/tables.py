"""Plain-text and markdown tables.

Example:

    print(format_table(["unit", "activation"], [["kv 3", 0.41], ["kv 4", None]]))
"""

from collections.abc import Sequence


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], markdown: bool = False
) -> str:
    """Return the rows as aligned text, one line each; columns of numbers stand to the right.

    Floats are shown with 4 significant digits, None and NaN as `-`; pass strings for any other
    form.
    """
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [any(_is_number(row[i]) for row in rows) for i in range(len(header))]
    lines = [_line(header, widths, right, markdown), _rule(widths, right, markdown)]
    return "\n".join(lines + [_line(line, widths, right, markdown) for line in cells])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: object) -> str:
    if value is None or value != value:  # NaN alone differs from itself.
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _line(cells: Sequence[str], widths: list[int], right: list[bool], markdown: bool) -> str:
    padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
    return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()


def _rule(widths: list[int], right: list[bool], markdown: bool) -> str:
    if not markdown:
        return "  ".join("-" * w for w in widths)
    return (
        "|"
        + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
        + "|"
    )
