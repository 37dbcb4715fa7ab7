"""A command that hands on what follows -- to another program.

Example:

    @click.command(cls=PassingCommand)
    def command():
        program(*passed_on())
"""

import click

KEY = "mod_export.passed_on"  # in the context's meta


class PassingCommand(click.Command):
    """A command that keeps what follows -- apart."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what comes before --."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[KEY] = tuple(args[end + 1 :])
        return super().parse_args(ctx, args[:end])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Name what follows -- in the usage."""
        return [*super().collect_usage_pieces(ctx), "[-- OPTIONS]"]


def passed_on() -> tuple[str, ...]:
    """Return what follows -- of the command that runs."""
    return click.get_current_context().meta[KEY]
