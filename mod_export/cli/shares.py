"""What options that take a share for each kind of unit have in common."""

import click


def shares(_ctx, _param, value: str) -> float | dict[str, float]:
    """`0.5` or `kv=0.5,attn=0.8`. Raises BadParameter for anything else."""
    try:
        if "=" not in value:
            return float(value)
        pairs = [
            (kind.strip(), float(share))
            for kind, _, share in (part.partition("=") for part in value.split(","))
        ]
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither a number nor kinds such as kv=0.5,attn=0.8"
        ) from None
    found = dict(pairs)
    if len(found) < len(pairs):
        raise click.BadParameter(f"{value!r} names a kind twice")
    return found
