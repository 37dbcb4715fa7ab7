"""What options that take a share for each kind of unit have in common."""

import click

from mod_export.errors import UserError
from mod_export.units import parse_shares


def shares(_ctx, _param, value: str) -> float | dict[str, float]:
    """`0.5` or `kv=0.5,attn=0.8`. Raises BadParameter for anything else."""
    try:
        return parse_shares(value)
    except UserError as error:
        raise click.BadParameter(str(error)) from None
