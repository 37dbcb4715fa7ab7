"""Kinds of numbers that options take."""

import math

import click


class Finite(click.FloatRange):
    """A number in a range; click's own lets NaN and infinity pass."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number
