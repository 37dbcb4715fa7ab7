"""`mod-export eval`: options for evaluate.py."""

import json

import click


@click.command("eval")
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.option("--text", "texts", multiple=True, type=click.Path(), metavar="FILE", help="UTF-8 text; may be repeated.")
@click.option("--length", type=click.IntRange(min=16), default=1024, show_default=True, help="Tokens in a sequence.")
@click.option("--count", type=click.IntRange(min=1), default=4, show_default=True,
              help="Sequences of each text, spread evenly over it.")
@click.option("--passkey", "haystack", type=click.Path(), metavar="FILE",
              help="Also hide 5-digit keys in this text and ask for them.")
@click.option("--passkey-lengths", default="1024,2048", show_default=True, help="Prompt lengths in tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(directory, texts, length, count, haystack, passkey_lengths, as_json):
    """Measure what the MoD model in DIR loses against its dense base: perplexity, KL, K/V, passkey retrieval."""
    from mod_export.errors import UserError

    if not texts and not haystack:
        raise UserError("nothing to measure", "give --text FILE or --passkey FILE")
    from mod_export import data, evaluate
    from mod_export.model import MoDModel

    lengths = parse_lengths(passkey_lengths)
    contents = {path: data.read_texts([path]) for path in (*texts, *([haystack] if haystack else []))}
    model = MoDModel.load(directory)
    result = {"model": directory, "texts": [], "passkey": []}
    for path in texts:
        click.echo(f"{path}: {count} sequences of {length} tokens", err=True)
        found = evaluate.loss(model, data.pack(model.tokenizer, contents[path], length, count))
        result["texts"].append({"text": path, **vars(found)})
    for tokens in lengths if haystack else ():
        click.echo(f"passkey retrieval at {tokens} tokens", err=True)
        result["passkey"].append(evaluate.passkey(model, contents[haystack], tokens))
    click.echo(json.dumps(result, indent=1) if as_json else as_text(result))


def parse_lengths(lengths: str) -> list[int]:
    """`1024,2048` -> [1024, 2048]. Raises UserError for anything else."""
    from mod_export.errors import UserError

    parts = [part.strip() for part in lengths.split(",")]
    if not all(part.isdigit() and 64 <= int(part) <= 10**6 for part in parts):
        raise UserError(f"cannot read lengths {lengths!r}", "write whole numbers from 64 on, such as 1024,2048")
    return [int(part) for part in parts]


def as_text(result: dict) -> str:
    """The tables for people."""
    from mod_export.tables import format_table

    tables = []
    if result["texts"]:
        header = ["text", "tokens", "perplexity dense", "MoD", "KL", "same best token", "activation", "KV of dense"]
        keys = ("text", "tokens", "perplexity_dense", "perplexity", "kl", "top1_agreement", "activation", "kv_share")
        tables.append(format_table(header, [[row[key] for key in keys] for row in result["texts"]]))
    if result["passkey"]:
        keys = ("length", "trials", "dense", "mod")
        tables.append(format_table(["passkey: tokens", "trials", "dense", "MoD"],
                                   [[row[key] for key in keys] for row in result["passkey"]]))  # fmt: skip
    return "\n\n".join(tables)
