"""Output directories: the one writer of checkpoints, engines and reports, with the same guarantees for all of them.

up to date    nothing is done where the output holds, intact, what this version makes of the same inputs and settings
refused       before any work: a path that cannot be used, a disk that is too small
unchanged     the inputs are those that were opened, also at the end
whole         the directory appears complete, with its manifest, or not at all
accounted     the manifest has the command, the settings, the package versions, and sha256 of every file that was read or written
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trtllm_thoughtx import files, report
from trtllm_thoughtx.checkpoint.generation_config import NAME, read_generation_config
from trtllm_thoughtx.checkpoint.members import Members, Stamps
from trtllm_thoughtx.progress import SILENT, Progress

PACKAGES = frozenset(("numpy", "onnx", "onnxruntime", "tensorrt_rtx", "tensorrt", "torch"))
SPACE_FOR_REST = 64 << 20  # config, manifest and carried files


class Output:
    """One output directory: `is_current`, then `prepare`, then files under `writing`.

    `settings` are all that decides what is made of the inputs: the checkpoint's `members`, and `more` files.
    """

    def __init__(
        self,
        target: Path,
        members: Members,
        settings: Mapping[str, Any],
        *,
        command: str,
        more: Sequence[Path] = (),
        force: bool = False,
        progress: Progress = SILENT,
    ) -> None:
        self.target, self.members, self.settings, self.command, self.force = Path(target), members, settings, command, force
        self.progress = progress
        self.packages = PACKAGES  # whose versions the manifest holds
        self.checks: list[dict[str, Any]] = []
        self.hashes: dict[str, str] = {}  # of files that were hashed while they were written
        self._paths = [*members.inputs(), *more]
        self._more = Stamps(more)
        self._rows: list[dict[str, Any]] | None = None

    def is_current(self) -> bool:
        """Whether the target already is what would be made; never with `force`."""
        return not self.force and report.is_current(self.target, self.settings, self.inputs)

    def inputs(self) -> list[dict[str, Any]]:
        """The manifest's rows about the inputs."""
        if self._rows is None:
            self._rows = report.manifest_inputs(self._paths, self.progress)
        return self._rows

    def prepare(self, num_bytes: int) -> None:
        """E130 for a target that cannot be used, E203 where `num_bytes` and the small files do not fit."""
        files.check_output(self.target, force=self.force, inputs=self.members.roots())
        files.require_space(self.target.absolute().parent, num_bytes + SPACE_FOR_REST)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield the directory to fill. When the block ends well it gets its manifest and becomes the target."""
        with files.atomic_dir(self.target, force=self.force) as partial:
            self.partial = partial
            pool, rows = ThreadPoolExecutor(1, "hash-inputs"), list[Future[list[dict[str, Any]]]]()
            try:
                if self._rows is None:  # beside the work, in file order: each finds the other's pages in memory
                    rows = [pool.submit(report.manifest_inputs, [path]) for path in sorted(self._paths, key=lambda path: path.name)]
                yield partial
                if self._rows is None:
                    self._rows = [row for future in rows for row in future.result()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            self.members.verify_unchanged()
            self._more.verify()
            report.write_manifest(
                partial,
                command=self.command,
                inputs=self._rows,
                config=report.plain(self.settings),
                checks=self.checks,
                environment=environment(self.packages),
                hashes=self.hashes,
            )

    def write(self, name: str, data: bytes | str) -> None:
        data = data.encode() if isinstance(data, str) else data
        with (self.partial / name).open("xb") as out:
            out.write(data)
        self.hashes[name] = hashlib.sha256(data).hexdigest()

    def carry(self, *names: str, root: Path | None = None) -> None:
        """Copy files of the checkpoint, or of `root`, as they are, however large. Settings of generation that only the checkpoint's
        config.json holds become a file of their own."""
        if root is None and NAME not in names and (settings := read_generation_config(self.members.root, self.members.config)):
            self.write(NAME, report.to_json(settings))
        for name in names:
            digest = hashlib.sha256()
            with files.open_inside(root or self.members.root, name) as source, (self.partial / name).open("xb") as out:
                while block := source.read(1 << 22):
                    out.write(block)
                    digest.update(block)
            self.hashes[name] = digest.hexdigest()


def environment(packages: Collection[str] = PACKAGES) -> dict[str, str]:
    """Versions that may matter to what was made."""
    versions = {}
    for package in sorted(packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system(), **versions}
