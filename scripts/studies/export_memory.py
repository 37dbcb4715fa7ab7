"""Time and memory of `export --base`: the routers of an adapter onto a GGUF file, by its size.

    python -m scripts.studies.export_memory --out export-memory 1b 8b

The files are random ones of these shapes in q4_0 (`mod-export synth`), and so are the routers. An
export runs in a process of its own; resident memory counts the pages of files that were read. The
file was just written, so that it is read from memory where there is enough. Rows go to
OUT/rows.jsonl, one for each of --repeats.
"""

import json
import subprocess
import sys
from pathlib import Path

import click
from safetensors.numpy import save_file

from mod_export.common.tables import format_table
from mod_export.formats import adapter_files, schema
from mod_export.formats.base_identity import gguf_identity
from mod_export.formats.gguf import GGUFFile
from scripts.studies import rows
from scripts.studies.convert_memory import measured

MOD_EXPORT = (sys.executable, "-m", "mod_export")


@click.command()
@click.argument("presets", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write in.")
@click.option("--quant", default="q4_0", show_default=True)
@click.option("--repeats", default=1, show_default=True, help="Exports of each file.")
def main(presets, out, quant, repeats):
    out.mkdir(parents=True, exist_ok=True)
    for preset in presets:
        dense, adapter = out / f"{preset}-{quant}.gguf", out / f"{preset}-adapter"
        if not adapter.is_dir():
            make(preset, quant, dense, adapter)
        row = {"model": preset, "quant": quant, "file MB": dense.stat().st_size // 10**6}
        for _ in range(repeats):
            rows.append(out / "rows.jsonl", row | exported(adapter, dense, out / "made.gguf"))
    found = rows.read(out / "rows.jsonl")
    click.echo(format_table(list(found[-1]), [list(row.values()) for row in found]))


def make(preset: str, quant: str, dense: Path, adapter: Path) -> None:
    """Write a random dense file, and an adapter for it."""
    mod = dense.with_suffix(".mod.gguf")
    command = [*MOD_EXPORT, "synth", preset, "-o", str(mod), "--dense", str(dense)]
    subprocess.run([*command, "--quant", quant, "--force"], check=True)
    config, routers = schema.read_routers(GGUFFile.open(mod))
    arrays = schema.to_tensors(config, routers, schema.hf_tensor_names)
    adapter.mkdir()
    save_file({k: v.copy() for k, v in arrays.items()}, adapter / adapter_files.ROUTERS)
    about = {"mod": config.to_dict(), "base": gguf_identity(GGUFFile.open(dense))}
    (adapter / adapter_files.MOD_JSON).write_text(json.dumps(about))
    mod.unlink()


def exported(adapter: Path, dense: Path, target: Path) -> dict:
    """Return time and peak of memory of an export."""
    command = [*MOD_EXPORT, "export", str(adapter), "--base", str(dense), "-o", str(target)]
    return measured([*command, "--force"], f"the export onto {dense}")


if __name__ == "__main__":
    main()
