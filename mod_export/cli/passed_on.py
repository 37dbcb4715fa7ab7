"""A command that hands on what follows -- to another program.

Example:

    @click.command(cls=PassingCommand)
    def command():
        program(*passed_on())
"""

import click

from mod_export.errors import UserError

KEY = "mod_export.passed_on"  # in the context's meta


class PassingCommand(click.Command):
    """A command that keeps what follows -- apart."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what comes before --."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[KEY] = tuple(args[end + 1 :])
        try:
            return super().parse_args(ctx, args[:end])
        except click.NoSuchOption as exc:
            # click tells the first letter of -np.
            name = next(word for word in args if word.startswith(exc.option_name))
            example = f"{ctx.command_path} {self.params[0].make_metavar(ctx)} -- {name}"
            raise UserError(
                exc.format_message().rstrip("."),
                f"an option of the program that it starts goes behind --: {example}",
            ) from exc

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Name what follows -- in the usage."""
        return [*super().collect_usage_pieces(ctx), "[-- OPTIONS]"]


def passed_on() -> tuple[str, ...]:
    """Return what follows -- of the command that runs."""
    return click.get_current_context().meta[KEY]
