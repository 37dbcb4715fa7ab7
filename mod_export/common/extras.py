"""Python modules that belong to an extra of the package, and may be missing."""

import importlib.util

from mod_export.errors import UserError

EXTRA_OF_MODULE = {
    "accelerate": "train",
    "peft": "train",
    "bitsandbytes": "four-bit",
    "matplotlib": "plots",
    "lm_eval": "lm-eval",
}


def cure(module: str) -> str:
    """Return what to do where a module is missing: the pip line of its extra, if it has one."""
    extra = EXTRA_OF_MODULE.get(module.split(".")[0])
    if extra is None:
        return "install mod-export with its dependencies"
    return f"pip install 'mod_export[{extra}]'"


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(*modules: str) -> None:
    """Raise UserError where one of the modules is missing. Call this before hours of work."""
    for module in modules:
        if not is_installed(module):
            raise UserError(f"the Python module {module} is missing", cure(module))
