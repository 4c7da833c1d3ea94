"""The native core, C++ behind Python: dense products, Mamba-2 kernels, decoding and search on CPU.

The extension module ``_crsm_native`` is built when the project is installed. It stands beside the package, not in it,
so that a copy of the sources (a job's working directory, say) finds the one that is installed. Where it is missing,
or was built from other sources, ``core`` is None and ``MISSING`` says why; the reference implementations then serve.

Processor: AVX-512, AVX2 or portable code is chosen when the module is loaded; ``CRSM_NATIVE_ISA`` in the environment
lowers the choice. ``CRSM_NATIVE_PATH`` names a folder with another build (one under a sanitizer, say). Threads:
``OMP_NUM_THREADS``, else all processors of the process; :func:`set_num_threads` changes it.
"""

from __future__ import annotations

import os
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType

INTERFACE = 4
"""Counts the changes of what Python and C++ expect of each other; ``src/module.cpp`` has the same number."""


def _load() -> tuple[ModuleType | None, str]:
    folder = os.environ.get("CRSM_NATIVE_PATH")
    try:
        module = _import_from(folder) if folder else _import_installed()
    except ImportError as error:
        return None, f"the extension module is not installed ({error}); a C++ compiler and `pip install` make it"
    found = getattr(module, "INTERFACE", None)
    if found != INTERFACE:
        return None, f"the extension module has interface {found}, the package {INTERFACE}; install the package again"
    return module, ""


def _import_installed() -> ModuleType:
    import _crsm_native

    return _crsm_native


def _import_from(folder: str) -> ModuleType:
    spec = PathFinder.find_spec("_crsm_native", [folder])
    if spec is None or spec.loader is None:
        raise ImportError(f"CRSM_NATIVE_PATH = {folder!r} holds none")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


core, MISSING = _load()


def available() -> bool:
    """Whether the native core can be used."""
    return core is not None


def require() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it is not there; the message says why and what to do.
    """
    if core is None:
        raise RuntimeError(f"no native core: {MISSING}")
    return core


def set_num_threads(count: int) -> None:
    """Bounds the threads of every native call from now on, its own included.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if core is not None:
        core.set_num_threads(count)
    elif count < 1:
        raise ValueError(f"threads = {count}; allowed: at least 1")


def describe() -> str:
    """One line for reports: what is in use, or why it is not."""
    if core is None:
        return f"not available: {MISSING}"
    return f"{core.isa()}, {core.num_threads()} threads"
