"""What all plots share: colours, the check of their folder, and saving a figure as a PNG file.

matplotlib is imported when a figure is saved.
"""

from pathlib import Path

from mod_export.common import extras
from mod_export.common.files import atomic_file
from mod_export.errors import UserError

# Okabe and Ito's colours: people with colour-blindness tell them apart.
BLACK = "#000000"
GREY = "#888888"
SKY_BLUE = "#56B4E9"
VERMILION = "#D55E00"
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
INK = "#444444"  # Text and axes have this colour.

DOTS_PER_INCH = 130


def check_folder(folder: str | Path, force: bool) -> Path:
    """Return the folder of plots as a path. Call this before hours of work.

    Raises UserError where plots could not be put there, and where matplotlib is missing.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"{folder} is not a directory", "choose another name for --plots")
    parent = path.absolute().parent
    if not path.exists() and not parent.is_dir():
        raise UserError(f"there is no directory {parent} to make {path.name} in", "create it first")
    if path.exists() and not force and (there := next(path.glob("*.png"), None)):
        raise UserError(f"{there} exists already", "use --force to replace the pictures")
    extras.require("matplotlib")
    return path


def save_figure(fig, target: Path, force: bool, dpi: int = DOTS_PER_INCH) -> None:
    """Write a figure as a PNG file, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    with atomic_file(target, force) as tmp:
        fig.savefig(tmp, format="png", dpi=dpi)
    plt.close(fig)
