"""`thoughtx-sign`: an engine directory gets its signature, and what a supply chain asks for beside it.

    provenance.sigstore.json   SLSA provenance from the manifest, signed
    bom.cdx.json               CycloneDX bill of materials from the manifest
    thoughtx.sig               the signature over every file, these two with them

The directory is compared with its manifest first, so that what is signed is what was built. A directory with a file that the manifest does
not list is refused: signing would vouch for it. All three files are there in the end, or none.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.files import atomic_file, read_inside
from trtllm_thoughtx.ship import envelope, provenance
from trtllm_thoughtx.ship.bom import bill
from trtllm_thoughtx.ship.signature import SIGNATURE, present, seal_files

PROVENANCE = "provenance.sigstore.json"
BOM = "bom.cdx.json"
MADE = (PROVENANCE, BOM, SIGNATURE)  # in the order of writing
MANIFEST_BYTES = 16 << 20


def sign(engine_dir: Path, key: Path, *, force: bool = False) -> dict[str, Any]:
    """Sign the engine in `engine_dir` with the PEM file `key`; `force` replaces a signature. E125 for a key that is none, E120 and E121 for
    a directory that is not as it was built, E130 for one that cannot be written or holds other files."""
    directory = EngineDir.open(Path(engine_dir))
    private = envelope.read_private_key(key)
    root = directory.root
    _check(root, {row["name"] for row in directory.manifest["outputs"]} | {report.MANIFEST}, force=force)
    directory.verify()
    manifest = directory.manifest
    digest = hashlib.sha256(read_inside(root, report.MANIFEST, MANIFEST_BYTES)).hexdigest()
    name = root.resolve().name
    attested = envelope.seal(provenance.subjects(manifest), provenance.PREDICATE_TYPE, provenance.provenance(manifest), private)
    materials = report.to_json(bill(name, digest, manifest, directory.config, directory.build)).encode()
    sums = {row["name"]: row["sha256"] for row in manifest["outputs"]} | {report.MANIFEST: digest}
    sums |= {file: hashlib.sha256(data).hexdigest() for file, data in ((PROVENANCE, attested), (BOM, materials))}
    _write(root, dict(zip(MADE, (attested, materials, seal_files(name, sums, private)), strict=True)))
    return {"engine_dir": str(engine_dir), "key": envelope.fingerprint(private.public_key()), "num_files": len(sums), "files": list(MADE)}


def _check(root: Path, known: set[str], *, force: bool) -> None:
    def refuse(what: str, why: str, fix: str) -> ThoughtxError:
        return ThoughtxError("E130", what, where=str(root), why=why, fix=fix)

    if not os.access(root, os.W_OK | os.X_OK):
        raise refuse("the engine directory cannot be written", "no permission, or a read-only file system", "copy it, and sign the copy")
    if os.path.lexists(root / SIGNATURE) and not force:
        raise refuse("the engine directory is signed already", f"it holds a {SIGNATURE}", "pass --force to replace the signature")
    if others := sorted(present(root) - known - set(MADE)):
        why = f"{report.MANIFEST} does not list: {listed([shown(name) for name in others])}"
        raise refuse("the directory holds files that the build did not make", why, "remove them; a signature vouches for every file")


def _write(root: Path, made: dict[str, bytes]) -> None:
    """The old signature goes first: at no moment does one lie beside files that it is not for."""
    try:
        (root / SIGNATURE).unlink(missing_ok=True)
        for name, data in made.items():
            with atomic_file(root / name) as file:
                file.write(data)
    except BaseException:
        for name in made:
            (root / name).unlink(missing_ok=True)
        raise
