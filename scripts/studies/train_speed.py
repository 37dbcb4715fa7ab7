"""Measure the speed of training against plain fine-tuning.

Both have the same model, batch, trained weights and precision, and take steps in turn.

    python -m scripts.studies.train_speed mod --text book.txt --train lora --precision bf16

Plain fine-tuning is the original model with transformers' own language-model loss. Routers alone
have no plain twin: there it is fine-tuning of all weights but the embeddings.
"""

import json
import statistics
import time
from pathlib import Path

import click


@click.command()
@click.argument("directory")
@click.option("--text", required=True)
@click.option(
    "--train", "parameters", type=click.Choice(["routers", "lora", "full"]), default="routers"
)
@click.option("--length", default=512, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures too.")
def main(json_path, **options):
    """Print the tokens per second of both, and the ratio."""
    from mod_export.common.tables import format_table

    figures = measure(**options)
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")
    print(format_table(list(figures), [list(figures.values())], markdown=True))


def measure(directory, text, parameters, length, batch, precision, rounds) -> dict:
    """Heading -> value of the table's row; speeds are medians of the steps."""
    import torch

    from mod_export.adapter import open_model
    from mod_export.data.text import pack, read_texts
    from mod_export.training.config import TrainConfig
    from mod_export.training.prepare import trained
    from mod_export.training.relaxation import relaxed_attention
    from mod_export.training.student import LossWeights, Student

    model = open_model(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = pack(model.tokenizer, read_texts([text]), length, batch).to(device)
    model.to(device)
    optimizer = torch.optim.AdamW(trained(model, TrainConfig((), parameters=parameters)))
    student = Student(
        model,
        None,
        [list(range(len(model.config.routed())))],
        LossWeights(),
    )
    twin, of_twin = model.base, optimizer
    if parameters == "routers":
        other = open_model(directory).to(device)
        of_twin = torch.optim.AdamW(trained(other, TrainConfig((), parameters="full"))[1:])
        twin = other.base
    prices, shares = torch.full((1,), 0.03, device=device), torch.full((1, 2), 0.5, device=device)
    counts = torch.ones_like(ids, dtype=torch.bool)

    def ours():
        with relaxed_attention(model.base):
            return student(ids, counts, counts, prices, shares)[0], optimizer

    def plain():
        return twin(ids, labels=ids, use_cache=False).loss, of_twin

    seconds = {ours: [], plain: []}
    for _ in range(rounds + 1):
        for step in (ours, plain):
            begin = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss, steps = step()
            loss.backward()
            steps.step()
            steps.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[step].append(time.perf_counter() - begin)
    a, b = (
        ids.numel() / statistics.median(seconds[step][1:]) for step in (ours, plain)
    )  # the first warms up
    return {
        "trained": parameters,
        "length": length,
        "batch": batch,
        "precision": precision,
        "device": device,
        "tokens/s": round(a),
        "plain fine-tuning": round(b),
        "ratio": round(a / b, 2),
    }


if __name__ == "__main__":
    main()
