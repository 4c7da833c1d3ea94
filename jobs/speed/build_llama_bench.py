"""Builds llama.cpp's llama-bench, and random models of the public shape for it, into one folder.

The sources are those inside llama-cpp-python's source package, from the package index that pip is set to. What is
already there is not made again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Annotated

import typer

from jobs.command import ROOT, run

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"


def main(
    folder: Annotated[Path, typer.Option("--folder", metavar="DIR", help="Where everything is kept.")] = ROOT
    / "build"
    / "llama",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Files compiled at the same time.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Of the random weights.")] = 0,
) -> None:
    """Build llama-bench and its models: some minutes and 2 GB the first time, nothing the second."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sources = unpack(folder)
    program = build(sources, folder / "build", jobs)
    convert(sources, folder, seed)
    print(program)


def unpack(folder: Path) -> Path:
    """The sources of llama.cpp, downloaded and unpacked.

    Raises:
        OSError: pip cannot get the package.
    """
    sources = folder / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if (sources / "CMakeLists.txt").is_file():
        return sources
    archive = folder / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.is_file():
        # pip asks a source package for its metadata, with tools that it downloads for that.
        download = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "-q"]
        _call([*download, "--no-binary", ":all:", f"{PACKAGE}=={VERSION}", "-d", str(folder)])
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return sources


def build(sources: Path, folder: Path, jobs: int) -> Path:
    """llama-bench for this processor.

    Raises:
        OSError: CMake or the compiler failed.
    """
    program = folder / "bin" / "llama-bench"
    if not program.is_file():
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
        options += ["-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF"]
        _call(["cmake", "-S", str(sources), "-B", str(folder), *options])
        _call(["cmake", "--build", str(folder), "--target", "llama-bench", "--parallel", str(jobs)])
    return program


def convert(sources: Path, folder: Path, seed: int) -> None:
    """A random Mamba-2 of the public shape as GGUF, in every number format that is compared.

    Raises:
        OSError: the conversion failed.
    """
    from jobs.speed.peers import transformers
    from jobs.speed.peers.llama_cpp import FILES, gguf_name
    from jobs.speed.peers.process import PeerError
    from jobs.speed.shapes import PUBLIC_130M as SHAPE

    missing = {name: folder / gguf_name(SHAPE.name, name) for name in FILES}
    missing = {name: path for name, path in missing.items() if not path.is_file()}
    if not missing:
        return
    model = folder / f"{SHAPE.name}-transformers"
    if not (model / "config.json").is_file():
        try:
            transformers.build(SHAPE, seed).save_pretrained(model)
        except PeerError as error:
            raise OSError(f"transformers, which writes the model that is converted, is {error}") from None
    # The converter's own package lies beside it; no tokenizer files: it takes the built-in vocabulary of GPT-NeoX.
    environment = os.environ | {"PYTHONPATH": str(sources / "gguf-py")}
    for name, path in missing.items():
        part = path.with_suffix(".part")
        converter = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(model)]
        _call([*converter, "--outtype", FILES[name], "--outfile", str(part)], environment)
        part.rename(path)


def _call(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])} … ended with exit status {done.returncode}")


if __name__ == "__main__":
    run(main)
