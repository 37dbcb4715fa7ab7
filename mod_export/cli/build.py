"""The command `mod-export build`."""

from pathlib import Path

import click

from mod_export.cli.output import show_messages


@click.command("build")
@click.option(
    "--jobs",
    "-j",
    type=click.IntRange(min=1),
    show_default="one for each core",
    help="Number of compilers at once.",
)
@click.option("--cuda", is_flag=True, help="Build for NVIDIA GPUs. This needs nvcc and cuBLAS.")
@click.option(
    "--cuda-arch",
    metavar="75,86,...",
    show_default="those of this machine",
    help="Architectures of the GPUs.",
)
@click.option(
    "--stock",
    is_flag=True,
    help="Build the unpatched library beside it, which bench compares with; with --tools, the "
    "unpatched tools.",
)
@click.option(
    "--tools",
    is_flag=True,
    help="Build the tools too: llama-server, llama-cli, llama-bench, llama-perplexity, "
    "llama-quantize and ggml-rpc-server. `mod-export tools` prints their folder.",
)
@click.option("--force", is_flag=True, help="Build again what is built already.")
@click.option(
    "--sdist",
    type=click.Path(path_type=Path),
    help="Source distribution of llama-cpp-python that is on this machine already.",
)
def command(
    jobs: int | None,
    cuda: bool,
    cuda_arch: str | None,
    stock: bool,
    tools: bool,
    force: bool,
    sdist: Path | None,
) -> None:
    """Build and install the patched llama.cpp.

    The library is installed as llama-cpp-python x.y.z+mod. The source is fetched with pip and
    verified. Builds are cached in $MOD_EXPORT_CACHE (default: ~/.cache/mod-export): the next build
    with the same source, patches, flags and compiler takes a second.
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
    if not (stock and tools):
        lib = llama_build.build(**options, sdist=sdist)
    if not stock:
        llama_build.install(lib, force=force)
    if tools:
        llama_build.build(**options, sdist=sdist, tools=True)
