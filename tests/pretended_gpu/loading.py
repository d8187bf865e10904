"""Compiles and loads the C++ half of the pretended GPU; imports no torch, which must come after it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")
BUILD = Path(__file__).resolve().parents[2] / "build" / "pretended_gpu"


def missing() -> str | None:
    """What keeps the pretended GPU from being built on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return "the pretended GPU is built on Linux only"
    if shutil.which("g++") is None:
        return "the pretended GPU needs g++"
    return None


def built() -> Path:
    """The shared library for this torch, compiled when it is not there yet (about ten seconds)."""
    version = importlib.metadata.version("torch").replace("+", "-")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = BUILD / f"shim-{version}-{digest}.so"
    if library.exists():
        return library
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    BUILD.mkdir(parents=True, exist_ok=True)
    draft = library.with_suffix(f".{os.getpid()}.tmp")
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", *includes, str(SOURCE), "-o", str(draft), *libraries]
    subprocess.run(command, check=True)
    os.replace(draft, library)  # two test processes may build at once
    return library


def load() -> None:
    """Load the library into this process. `ImportError` when torch is there already: it has asked for CUDA by then."""
    if "torch" in sys.modules:
        raise ImportError("the pretended GPU is loaded before torch")
    ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
