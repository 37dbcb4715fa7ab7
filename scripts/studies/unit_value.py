"""What the units that a trained model skips would add, and if other routers would choose better.

    python -m scripts.studies.unit_value trained -d train/ --sequences 60 --length 512

The value of a token and an `ffn` unit is how much the KL to the original rises without the unit,
all else as it is. Near its gate G the KL is about quadratic. So the value is -(slope at one half) =
C (G - 1/2) - slope at G, with the curvature C from gradients of log-likelihoods of tokens drawn
from the model (Fisher information).

Routers are fitted anew to the value on two thirds of the sequences. All routers are compared on the
rest at equal activation: the value of what they skip, summed over units. To choose by the curvature
itself is a bound and no way, because its noise is in the value too.
"""

from dataclasses import dataclass, field

import click
import torch

from mod_export.adapter import open_model
from mod_export.calibration.ridge import Ridge
from mod_export.calibration.thresholds import quantile_logit
from mod_export.cli.output import show_messages
from mod_export.common.tables import format_table
from mod_export.data.packing import open_data
from mod_export.metrics import kl_divergence
from mod_export.model import architectures, loading
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import rms_norm, threshold_logit
from mod_export.training.relaxation import (
    Relaxation,
    RelaxedDecisions,
    relaxed_attention,
)

# A few units have a value of ten nats, which would be all that least squares sees.
MAX_VALUE_NATS = 1.0
# Fit -> penalty of the ridge.
FITS = {
    "fitted to the value, clipped": 3.0,
    "fitted to the log of the curvature": 0.3,
}
MIN_CURVATURE = 1e-5  # Curvatures are at least this large where their logarithm is taken.


@dataclass(frozen=True)
class Gates(Relaxation):
    """Gates whose gradients are asked for."""

    leaves: list = field(default_factory=list)

    def gate(self, z, active):
        self.leaves.append(active.float().requires_grad_(True))
        return self.leaves[-1]


def measure(
    model: MoDModel, dense: MoDModel, ids: torch.Tensor, draws: int, autocast: bool
) -> tuple:
    """Measure one sequence of ids [T].

    Returns value, curvature, the logits' distance to the threshold, and active, each [T, n_units];
    KL [T]; inputs of the routers [n_units, T, n_embd].
    """
    units, inputs, gates = model.config.routed(), {}, Gates()
    hooks = [
        model.router(unit).register_forward_pre_hook(
            lambda router, args, unit=unit: inputs.__setitem__(
                unit, rms_norm(args[0].detach(), router.eps)[0]
            )
        )
        for unit in units
    ]
    with torch.no_grad():
        log_p = dense(ids[None])[0].float().log_softmax(-1)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        relaxed_attention(model.base),
    ):
        logits, trace = model(ids[None], trace=True, strategy=RelaxedDecisions(gates))
    for hook in hooks:
        hook.remove()
    log_q = logits.detach()[0].float().log_softmax(-1)
    q, kl = log_q.exp(), kl_divergence(log_p, log_q)

    def slopes(of_logits: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(
            logits, gates.leaves, of_logits[None].to(logits.dtype), retain_graph=True
        )
        return torch.stack([slope[0] for slope in found], dim=-1)

    slope, curvature = slopes(q - log_p.exp()), 0.0
    for _ in range(draws):
        drawn = torch.multinomial(q, 1)
        curvature = (
            curvature + slopes(q.scatter_add(1, drawn, -torch.ones_like(q[:, :1]))).pow(2) / draws
        )
    cut = torch.tensor([threshold_logit(model.router(unit).threshold) for unit in units])
    active = trace.active[0].float()
    value = curvature * (active - 0.5) - slope
    return (
        value,
        curvature,
        trace.logit[0].detach() - cut,
        active,
        kl,
        torch.stack([inputs[unit] for unit in units]),
    )


def lost(score: torch.Tensor, value: torch.Tensor, share: float) -> float:
    """Return the value of what is skipped per token, summed over units.

    The `share` of (token, unit) pairs with the highest score is active.
    """
    return (value * (score < quantile_logit(score, share))).sum(-1).mean().item()


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option("--data", "-d", multiple=True, required=True, help="Text.")
@click.option("--original", default="smollm2", show_default=True)
@click.option("--sequences", type=click.IntRange(3), default=60, show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens in each.")
@click.option("--draws", default=2, show_default=True, help="Of tokens, for the curvature.")
@click.option(
    "--limit", default=240_000, show_default=True, help="Tokens that the sequences are taken from."
)
@click.option(
    "--bf16/--float32",
    default=True,
    show_default=True,
    help="Precision of the passes with gradients.",
)
def main(directory, data, original, sequences, length, draws, limit, bf16):
    """Compare the routers of the trained model in DIRECTORY, of `ffn` units, with others."""
    show_messages(stdout=True)
    model = open_model(directory)
    units = model.config.routed()
    if not units or {unit.kind for unit in units} != {"ffn"}:
        raise click.ClickException(
            "only ffn units: what a token of others leaves for later ones is not measured"
        )
    model.requires_grad_(False)
    dense = MoDModel.from_base(loading.load(original)[0], model.tokenizer)
    texts = open_data(model.tokenizer, data, length, "all", limit)
    torch.manual_seed(0)
    fits = {name: [Ridge(architectures.n_embd(model.base)) for _ in units] for name in FITS}
    kept, rows, routers, sinks = sequences * 2 // 3, [], {}, model.config.sink_tokens
    for number in range(sequences):
        ids = texts[number * len(texts) // sequences]["input_ids"]
        value, curvature, z, active, kl, x = measure(model, dense, ids, draws, bf16)
        click.echo(f"sequence {number + 1} of {sequences}: KL {kl.mean():.4f}", err=True)
        if number < kept:
            goals = (
                value.clamp(-MAX_VALUE_NATS, MAX_VALUE_NATS),
                curvature.clamp(min=MIN_CURVATURE).log(),
            )
            for of_units, goal in zip(fits.values(), goals, strict=True):
                for i, fit in enumerate(of_units):
                    fit.add(x[i, sinks:], goal[sinks:, i, None])
            continue
        routers = routers or {
            name: [fit.solve(FITS[name]) for fit in of_units] for name, of_units in fits.items()
        }
        scores = {
            "as trained": z,
            "by the curvature itself": curvature,
            "at random": torch.rand_like(z),
        }
        for name, of_units in routers.items():
            scores[name] = torch.stack([x[i] @ w[0] + b for i, (w, b) in enumerate(of_units)], -1)
        rows.append(
            (
                value[sinks:],
                active[sinks:],
                kl,
                {name: score[sinks:] for name, score in scores.items()},
            )
        )
    value, active, kl = (torch.cat([row[i] for row in rows]) for i in range(3))
    share = active.mean().item()
    table = []
    for name in rows[0][3]:
        score = torch.cat([row[3][name] for row in rows])
        table.append([name, f"{lost(score, value, share):.4f}"])
    click.echo(format_table(["routers", "value of what is skipped"], table, markdown=True))
    click.echo(f"activation {share:.3f}, KL {kl.mean():.4f}")


if __name__ == "__main__":
    main()
