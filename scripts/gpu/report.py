"""Write the tables and plots of bench.jsonl.

The tables are in bench.md. Each model and kind of units has a folder of PNG files.
"""

import bench
from common import RESULTS, part

from mod_export.benchmark import plots as bench_plots
from mod_export.benchmark import report as bench_report
from mod_export.common.files import atomic_file
from mod_export.errors import UserError


def main() -> bool:
    groups: dict[str, list[dict]] = {}
    for line in {line["point"]: line for line in bench.finished()}.values():
        if "error" not in line:
            groups.setdefault("-".join(line["point"].split()[:-1]), []).append(line)
    if not groups:
        raise UserError(
            f"there is no finished point in {RESULTS / 'bench.jsonl'}", "run the part `bench` first"
        )
    text = [
        f"# Benchmark on {', '.join(name for name, _ in gpus(groups)) or 'a CPU, a rehearsal'}\n"
    ]
    for name, lines in groups.items():
        rows = [row for line in lines for row in line["rows"]]
        rows.sort(key=lambda row: (row["context"], row["shift"] != 0))
        result = {"about": lines[0]["about"], "rows": rows}
        text += [f"\n## {name}\n", bench_report.tables(result, markdown=True), ""]
        text += [f"\n![{path.stem}]({path.relative_to(RESULTS)})" for path in draw(result, name)]
    with atomic_file(RESULTS / "bench.md", force=True) as tmp:
        tmp.write_text("\n".join(text) + "\n")
    print(f"wrote {RESULTS / 'bench.md'}")
    return True


def gpus(groups: dict[str, list[dict]]) -> list[tuple[str, int]]:
    return sorted(
        {tuple(gpu) for lines in groups.values() for line in lines for gpu in line["about"]["gpus"]}
    )


def draw(result: dict, name: str) -> list:
    try:
        return bench_plots.draw(result, RESULTS / name, force=True)
    except ModuleNotFoundError as exc:
        raise UserError(
            f"plots need {exc.name}", "run the part `report` where matplotlib is"
        ) from exc


if __name__ == "__main__":
    part(main, needs_gpu=False)
