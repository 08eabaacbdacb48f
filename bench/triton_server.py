"""A real Triton server on a machine without a container: the one in the nvidia-pytriton wheel, with its Python backend.

    make triton
    thoughtx-export --engine_dir ENGINE --triton repository
    python bench/triton_server.py repository --http_port 8000 --grpc_port 8001 -- --log-verbose=1

The backend starts the Python whose `bin` is first in PATH and reads no PYTHONPATH, so it gets a small environment of its own: the
packages of `--venv`, and this source tree.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prepared(venv: Path, work: Path, packages: Sequence[Path] = (ROOT,)) -> tuple[Path, Path, dict[str, str]]:
    """The server's program, its folder of backends and its environment. `packages`: folders to import from, beside those of `venv`."""
    python = venv / "bin" / "python"
    script = "import sys, pathlib, pytriton; print('%d.%d' % sys.version_info[:2]); print(pathlib.Path(pytriton.__file__).parent)"
    version, place = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    triton = Path(place) / "tritonserver"
    own, backend = work / "python", work / "backends" / "python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", "--without-pip", own], check=True)
    site = own / "lib" / f"python{version}" / "site-packages"
    (site / "thoughtx.pth").write_text("".join(f"{folder}\n" for folder in (triton.parents[1], *packages)))
    backend.mkdir(parents=True, exist_ok=True)
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    for file in (*(triton / "backends" / "python").iterdir(), stub):
        if file.is_file() and not (backend / file.name).exists():
            (backend / file.name).symlink_to(file)
    path = os.pathsep.join((str(own / "bin"), os.environ.get("PATH", "")))
    return triton / "bin" / "tritonserver", work / "backends", {**os.environ, "PATH": path}


def words(program: Path, backends: Path, repository: Path, http_port: int, grpc_port: int) -> list[str]:
    """The command line: this machine alone may ask, and there are no metrics."""
    ports = [f"--http-port={http_port}", f"--grpc-port={grpc_port}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    return [str(program), f"--model-repository={repository}", f"--backend-directory={backends}", *ports, "--allow-metrics=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--http_port", type=int, default=8000)
    parser.add_argument("--grpc_port", type=int, default=8001)
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".triton", help="where nvidia-pytriton and what this package needs are installed"
    )
    parser.add_argument("more", nargs="*", help="further flags of tritonserver, behind --")
    args = parser.parse_args()
    if not (args.venv / "bin" / "python").exists():
        sys.exit(f"{args.venv} is not there: make triton")
    program, backends, environment = prepared(args.venv, args.venv / "thoughtx")
    os.execve(program, [*words(program, backends, args.repository, args.http_port, args.grpc_port), *args.more], environment)


if __name__ == "__main__":
    main()
