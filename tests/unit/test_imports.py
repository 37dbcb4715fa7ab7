"""The order of the packages: each module imports only from floors below its own.

The imports are read from the source, so that an import inside a function counts as well.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mod_export"

# Each floor may import from the floors before it. A name is a package or a module on top.
FLOORS = (
    ("errors",),
    ("units",),
    ("config",),
    ("common",),
    ("formats",),
    ("llamacpp",),
    ("model",),
    ("adapter",),
    ("data",),
    ("runtime",),
    ("metrics",),
    ("calibration",),
    ("training",),
    ("convert", "inspection"),
    ("export",),
    ("evaluation",),
    ("benchmark",),
    ("synthetic",),
    ("trace", "generate_data"),
    ("serving",),
    ("cli",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}

# Where a library may be imported, by room. The torch half and the llama.cpp half meet in
# evaluation/ and in the verbs on top, which import inside their functions what they need.
TORCH_ROOMS = {"model", "adapter", "data", "metrics", "calibration", "training", "evaluation"}
LLAMA_ROOMS = {"runtime", "evaluation", "benchmark", "synthetic", "serving", "generate_data"}
# What imports torch itself is of the torch half too.
TORCH_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors.torch")
# The rooms that compute with either library, and may not know a room of the other half.
TORCH_HALF = {"model", "adapter", "calibration", "training"}
LLAMA_HALF = LLAMA_ROOMS - {"evaluation"}
# Names that the package gives lazily, and where they come from.
LAZY_NAMES = {
    "MoDLlama": "runtime.llama",
    "MoDModel": "model.mod_model",
    "runtime.MoDLlama": "runtime.llama",
    "model.MoDModel": "model.mod_model",
}


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute in this package"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; a package's own name stands for its __init__."""
    result = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and name != "__main__":
            result[name] = path
    return result


def edges() -> set[tuple[str, str]]:
    """(module, module that it imports) inside the package."""
    known = modules()
    found = set()
    for name, path in known.items():
        for dotted in imports(path):
            target = dotted.removeprefix("mod_export.")
            target = LAZY_NAMES.get(target, target)
            if dotted.startswith("mod_export.") and target in known and target != name:
                found.add((name, target))
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def broken() -> list[str]:
    """Imports that climb, as `importer -> imported`."""
    return sorted(
        f"{source} -> {target}"
        for source, target in edges()
        if room(source) != room(target) and FLOOR[room(target)] >= FLOOR[room(source)]
    )


def circles() -> list[list[str]]:
    """Modules that import each other, in groups. A package's __init__ counts as no module here:
    it imports its own modules lazily.
    """
    graph: dict[str, set[str]] = {}
    packages = {room(name) for name in modules() if "." in name}
    for source, target in edges():
        if source not in packages and target not in packages:
            graph.setdefault(source, set()).add(target)

    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for following in graph.get(todo.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        return seen

    reach = {name: reachable(name) for name in graph}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach.get(other, ())))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def test_every_module_has_a_floor():
    assert {room(name) for name in modules()} == set(FLOOR)


def test_imports_run_one_way():
    assert broken() == []


def test_no_module_imports_itself_through_others():
    assert circles() == []


@pytest.mark.parametrize(
    ("libraries", "allowed"),
    [(TORCH_LIBRARIES, TORCH_ROOMS), (("llama_cpp",), LLAMA_ROOMS)],
)
def test_each_half_has_its_library(libraries, allowed):
    """No room imports the library of the other half, not even inside a function."""
    found = {
        name
        for name, path in modules().items()
        if any(f"{dotted}.".startswith(f"{x}.") for dotted in imports(path) for x in libraries)
    }
    assert sorted(name for name in found if room(name) not in allowed) == []


def test_the_halves_do_not_import_each_other():
    """No room of one half imports a room of the other half."""
    halves = (TORCH_HALF, LLAMA_HALF)
    across = [
        f"{source} -> {target}"
        for source, target in edges()
        for one, other in (halves, halves[::-1])
        if room(source) in one and room(target) in other
    ]
    assert sorted(across) == []
