"""Decisions as a picture: tokens across, units down, one cell for each decision.

Example:

    decisions = read_decisions(llm, "Once upon a time", generate=20)
    draw(decisions, "depth.png")
"""

import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mod_export.common.files import atomic_file
from mod_export.common.progress import stage
from mod_export.errors import UserError
from mod_export.runtime.templates import ChatTemplate, has_template
from mod_export.units import KV, UNIT_KINDS, Unit, units_of

logger = logging.getLogger(__name__)

SKIPPED_COLOUR = "#F0F0EC"
TOKEN_WIDTH_INCHES = 0.135  # the text of a token still reads at 6 points
MAX_TOKENS = 8192
# The first one comes with matplotlib. A character is taken from the first font that has it.
FONTS = ("DejaVu Sans Mono", "Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Unifont")


@dataclass(frozen=True)
class Decisions:
    """What each token did.

    active: bool [n_tokens, n_units]. texts: the text of each token. n_prompt: the number of tokens
    before the generated ones.
    """

    active: np.ndarray
    units: list[Unit]
    texts: list[str]
    n_prompt: int
    title: str = ""


def read_decisions(llm, prompt: str, generate: int = 0, chat: bool = False) -> Decisions:
    """Run the prompt and `generate` more tokens, the likeliest each time.

    chat: the prompt is a question of a user, which the chat template puts as the model knows it;
    else it is plain text, and the model goes on with it. A model that ends the text earlier is said
    to do so. Raises UserError for a dense model, one without a template for `chat`, an empty prompt
    and one that does not fit the context.
    """
    if not llm.units:
        raise UserError(
            f"{llm.model_path} is a dense model, so it decides nothing",
            "use a MoD file, or put routers beside it with --mod",
        )
    if not prompt:
        raise UserError("the prompt is empty", "give it some text")
    tokens = _prompt_tokens(llm, prompt, chat)
    what = f"{len(tokens)} tokens of the prompt and {generate} more"
    if len(tokens) + generate > MAX_TOKENS:
        raise UserError(f"{what} are more than a picture shows, {MAX_TOKENS}", "use less of them")
    if len(tokens) + generate > llm.n_ctx():
        raise UserError(
            f"{what} do not fit the context of {llm.n_ctx()}",
            "use a larger --ctx" + (", or --generate less" if generate else ", or less text"),
        )
    n_prompt = len(tokens)
    with llm.recording() as batches, stage("running the model"):
        if generate:
            # A token's decisions come with its own decode, so one token more is asked for.
            for i, token in enumerate(llm.generate(tokens, temp=0.0)):
                if i == generate:
                    break
                if llm.is_end(token):
                    logger.info(_early_end(i, generate, chat or not has_template(llm)))
                    break
                tokens = tokens + [token]
        else:
            llm.reset()
            llm.eval(tokens)
    active = np.concatenate([a for a, _ in batches]).astype(bool)
    texts = [llm.piece(t, special=True).decode("utf-8", "replace") for t in tokens[: len(active)]]
    return Decisions(
        active,
        units_of(llm.units),
        texts,
        n_prompt,
        Path(llm.model_path).name,
    )


def _prompt_tokens(llm, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return llm.tokenize(prompt.encode(), special=True)
    text = ChatTemplate.of(llm).render([{"role": "user", "content": prompt}], "the prompt")
    return llm.tokenize(text.encode(), add_bos=False, special=True)


def _early_end(count: int, wanted: int, chat: bool) -> str:
    """The note that the model has ended the text; of plain text that a question may be meant."""
    cure = "" if chat else "; with --chat the prompt is a question that the model answers"
    return f"note: the model ended the text after {count} of {wanted} tokens{cure}"


def draw(
    decisions: Decisions, path: str | Path, force: bool = False, per_row: int | None = None
) -> None:
    """Write the picture; its format follows the ending of its name: png, pdf, svg.

    Long texts are wrapped into rows of `per_row` tokens. Raises UserError where the path cannot be
    written.
    """
    import matplotlib

    matplotlib.use("Agg")
    suffix = check_output(path, force)
    with atomic_file(path, force) as tmp:
        fig = _figure(_by_kind(decisions), per_row or _per_row(len(decisions.active)))
        with warnings.catch_warnings(record=True) as caught:
            fig.savefig(tmp, format=suffix, dpi=150)
        import matplotlib.pyplot as plt

        plt.close(fig)
    if any("missing from font" in str(warning.message) for warning in caught):
        logger.warning(
            "note: no installed font has all characters of the text, so some are boxes; "
            f"install one of {', '.join(FONTS[1:])}"
        )


def check_output(path: str | Path, force: bool) -> str:
    """The picture's format. Call this before a long run.

    Raises UserError where the picture could not be written.
    """
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in ("png", "pdf", "svg"):
        raise UserError(f"cannot draw {path}", "let its name end in .png, .pdf or .svg")
    if Path(path).exists() and not force:
        raise UserError(f"{path} exists already", "use --force to replace it")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"there is no directory {Path(path).absolute().parent}", "create it first")
    return suffix


def _by_kind(decisions: Decisions) -> Decisions:
    """Put the units of a kind together, by layer.

    This order shows patterns over depth, which interleaved kinds would hide.
    """
    order = sorted(
        range(len(decisions.units)),
        key=lambda i: (UNIT_KINDS[decisions.units[i].kind].order, decisions.units[i]),
    )
    return replace(
        decisions, active=decisions.active[:, order], units=[decisions.units[i] for i in order]
    )


def _per_row(n: int) -> int:
    """Tokens in a row.

    It is one row while that fits the width of a page. Longer texts have rows of at most 96 tokens,
    and of 160 above 960 tokens.
    """
    if n <= 96:
        return n
    rows = -(-n // (96 if n <= 960 else 160))
    return -(-n // rows)


def _figure(decisions: Decisions, per_row: int):
    import matplotlib.pyplot as plt

    n, n_units = decisions.active.shape
    rows = -(-n // per_row)
    unit = min(0.15 if rows < 4 else 0.09, max(0.045, 3.2 / n_units))  # height of a unit
    left, right, top = 0.6, 0.75, 0.62
    text_height = 0.09 + 0.052 * min(12, max(len(_label(t)) for t in decisions.texts))
    panel, gap = unit * n_units, text_height + 0.12
    # Characters of 8 and of 6.5 points.
    title = 0.074 * len(_title(decisions))
    legend = sum(0.28 + 0.054 * len(label) for label in _legend_of(decisions))
    width = max(left + TOKEN_WIDTH_INCHES * per_row + right, left + max(title, legend), 5.5)
    height = top + rows * (panel + gap) + 0.1
    fig = plt.figure(figsize=(width, height))
    for row in range(rows):
        bottom = height - top - (row + 1) * panel - row * gap
        part = slice(row * per_row, min(n, (row + 1) * per_row))
        span = TOKEN_WIDTH_INCHES * (part.stop - part.start)
        ax = fig.add_axes((left / width, bottom / height, span / width, panel / height))
        _panel(ax, decisions, part)
        if row == 0:
            share = fig.add_axes(
                ((left + span + 0.06) / width, bottom / height, 0.55 / width, panel / height)
            )
            _shares(share, decisions)
    _legend(fig, decisions, left / width, height)
    return fig


def _panel(ax, decisions: Decisions, part: slice) -> None:
    """Draw the decisions of some tokens."""
    from matplotlib import font_manager
    from matplotlib.colors import to_rgb

    on = np.array([to_rgb(UNIT_KINDS[unit.kind].colour) for unit in decisions.units])
    active = decisions.active[part].T[..., None]
    ax.imshow(
        np.where(active, on[:, None], to_rgb(SKIPPED_COLOUR)),
        aspect="auto",
        interpolation="nearest",
    )
    n = part.stop - part.start
    ax.set_xticks(
        range(n),
        [_label(t) for t in decisions.texts[part]],
        rotation=90,
        fontsize=5.5,
        family=[name for name in FONTS if name in font_manager.get_font_names()],
        parse_math=False,
    )
    for label, i in zip(ax.get_xticklabels(), range(part.start, part.stop), strict=True):
        label.set_color("#222222" if i < decisions.n_prompt else "#B00020")
    points = ax.figure.get_figheight() * ax.get_position().height * 72 / len(decisions.units)
    ax.set_yticks(*_unit_labels(decisions.units, points), fontsize=6)
    by_head = any(unit.head is not None for unit in decisions.units)
    for kind, (first, last) in _bands(decisions.units).items():
        heads = " (a row for each head)" if by_head and kind == KV else ""
        room = (last - first + 1) * points / (0.55 * 6.5)  # characters beside the band
        labels = [f"{kind}, layer{heads}", f"{kind}, layer", kind]
        label = next((label for label in labels if len(label) <= room), None)
        ax.text(
            -0.47 / TOKEN_WIDTH_INCHES,
            (first + last) / 2,
            label or kind,
            fontsize=6.5,
            rotation=90 if label else 0,  # across, beside a band of one row
            ha="center",
            va="center",
        )
    ax.tick_params(length=0, pad=2)
    ax.text(-0.5, -0.75, str(part.start), fontsize=5, color="#888888", ha="left", va="bottom")
    ax.set_xticks(np.arange(0.5, n - 1), minor=True)
    ax.set_yticks(np.arange(0.5, len(decisions.units) - 1), minor=True)
    ax.grid(which="minor", color="white", linewidth=0.4 if points > 5 else 0.25)
    if by_head:  # a line between the layers, since the rows of a layer belong together
        edges = [i - 0.5 for i in range(1, len(decisions.units)) if _new_layer(decisions.units, i)]
        ax.hlines(edges, -0.5, n - 0.5, color="#999999", linewidth=0.4)
    for first, _ in list(_bands(decisions.units).values())[1:]:
        ax.axhline(first - 0.5, color="#444444", linewidth=0.6)
    ax.tick_params(which="minor", length=0)
    if part.start < decisions.n_prompt < part.stop:
        ax.axvline(decisions.n_prompt - part.start - 0.5, color="#B00020", linewidth=1)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _new_layer(units: list[Unit], i: int) -> bool:
    """Whether the row before is of another layer or kind."""
    return units[i][:2] != units[i - 1][:2]


def _bands(units: list[Unit]) -> dict[str, tuple[int, int]]:
    """kind -> its first and last row."""
    rows: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        rows.setdefault(unit.kind, []).append(i)
    return {kind: (r[0], r[-1]) for kind, r in rows.items()}


def _unit_labels(units: list[Unit], points: float) -> tuple[list[float], list[int]]:
    """Where layers are named beside their rows, so few that lines of 6 points do not touch.

    points: height of a row. The rows of a layer's heads share a label.
    """
    ticks: list[float] = []
    labels = []
    for first, last in _bands(units).values():
        layers: dict[int, list[int]] = {}
        for i in range(first, last + 1):
            layers.setdefault(units[i].layer, []).append(i)
        free = float(first) - 1
        for layer, rows in layers.items():
            middle = (rows[0] + rows[-1]) / 2
            if (middle - free) * points >= 6.2 or layer == units[first].layer:
                ticks.append(middle)
                labels.append(layer)
                free = middle
    return ticks, labels


def _shares(ax, decisions: Decisions) -> None:
    """Draw bars beside the first panel: each unit's share of active tokens in the whole text."""
    share = decisions.active.mean(0)
    ax.barh(
        range(len(share)),
        share,
        color=[UNIT_KINDS[unit.kind].colour for unit in decisions.units],
        height=0.8,
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(len(share) - 0.5, -0.5)
    ax.set_yticks([])
    ax.set_xticks([0, 1], ["0", "1"], fontsize=5.5)
    ax.tick_params(length=2, pad=1)
    ax.set_title("share", fontsize=6, pad=2)
    for name in ("top", "right"):
        ax.spines[name].set_visible(False)


def _title(decisions: Decisions) -> str:
    title = (
        f"{decisions.title}: {len(decisions.active)} tokens, {len(decisions.units)} units, "
        f"activation {decisions.active.mean():.2f}"
    )
    if decisions.n_prompt < len(decisions.active):
        title += f" (generated: from token {decisions.n_prompt}, red)"
    return title


def _legend_of(decisions: Decisions) -> dict[str, str]:
    """Label -> colour, of each kind and of what is inactive."""
    return {
        f"{kind}: {UNIT_KINDS[kind].active} ({_mean(decisions, kind):.0%})": UNIT_KINDS[kind].colour
        for kind in UNIT_KINDS
        if any(kind == unit.kind for unit in decisions.units)
    } | {"inactive": SKIPPED_COLOUR}


def _legend(fig, decisions: Decisions, left: float, height: float) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=x) for x, colour in _legend_of(decisions).items()]
    title = _title(decisions)
    fig.text(left, 1 - 0.12 / height, title, fontsize=8, va="top", parse_math=False)
    fig.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.27 / height),
        ncols=len(patches),
        fontsize=6.5,
        frameon=False,
        borderaxespad=0,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )


def _mean(decisions: Decisions, kind: str) -> float:
    return float(decisions.active[:, [unit.kind == kind for unit in decisions.units]].mean())


def _label(text: str) -> str:
    """A token's text in at most 12 characters, with white space made visible."""
    text = text.replace("\n", "↵").replace("\t", "→").replace(" ", "·" if not text.strip() else " ")
    text = "".join(c if c.isprintable() else "�" for c in text)
    text = text.strip() or text
    return text if len(text) <= 12 else text[:11] + "…"
