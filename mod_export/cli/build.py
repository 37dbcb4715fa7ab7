"""`mod-export build`: options for llama_build."""

from pathlib import Path

import click

from mod_export.cli.output import show_messages


@click.command("build")
@click.option(
    "--jobs", "-j", type=click.IntRange(min=1), help="Compilers at once; default: one per core."
)
@click.option("--cuda", is_flag=True, help="Build for NVIDIA GPUs; needs nvcc and cuBLAS.")
@click.option(
    "--cuda-arch", metavar="75,86,...", help="Their architectures; default: native, this machine's."
)
@click.option(
    "--stock", is_flag=True, help="Build the unpatched library beside it, as the bench's ceiling."
)
@click.option("--force", is_flag=True, help="Build again what is built already.")
@click.option(
    "--sdist", type=click.Path(path_type=Path), help="Source distribution that is here already."
)
def command(
    jobs: int | None,
    cuda: bool,
    cuda_arch: str | None,
    stock: bool,
    force: bool,
    sdist: Path | None,
) -> None:
    """Build the patched llama.cpp and install it as llama-cpp-python x.y.z+mod.

    The source is fetched with pip and verified. Builds are cached in $MOD_EXPORT_CACHE
    (default: ~/.cache/mod-export), so that the next one with the same source, patches, flags
    and compiler takes a second.
    """
    from mod_export.llamacpp import build as llama_build

    show_messages(stdout=True)
    options = {
        "jobs": jobs,
        "cuda": cuda or bool(cuda_arch),
        "cuda_arch": cuda_arch,
        "stock": stock,
        "force": force,
    }
    lib = llama_build.build(**options, sdist=sdist)
    if not stock:
        llama_build.install(lib, force=force)
