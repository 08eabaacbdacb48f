"""The signature of an engine directory, in OpenSSF Model Signing's form: `thoughtx.sig` states the sha256 of every file beside it.

The statement's subject is the directory with one digest over those of its files; its predicate lists them. All files are signed, the
manifest with the others, so no file is added, removed, renamed or changed unseen, and the manifest is not swapped for another. Verifying
reads no file that the check against the manifest reads: the signed sums are compared with the manifest's, and those with the files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.files import PLAIN_NAME, open_inside, read_inside
from trtllm_thoughtx.report import MANIFEST, Check
from trtllm_thoughtx.ship import envelope

SIGNATURE = "thoughtx.sig"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
OF_GIT = (".git", ".gitattributes", ".github", ".gitignore")  # never part of a model
SIGNATURE_BYTES = 16 << 20


@dataclass(frozen=True)
class Signed:
    """Who signed a directory, and the sha256 of each of its files."""

    key: str
    files: dict[str, str]


def seal_files(name: str, files: Mapping[str, str], private: Any) -> bytes:
    """The signature of a directory `name` that holds `files`: sha256 by name."""
    resources = [{"name": file, "algorithm": "sha256", "digest": files[file]} for file in sorted(files)]
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE, *OF_GIT]}
    subject = {"name": name, "digest": {"sha256": _root_digest(files)}}
    return envelope.seal([subject], PREDICATE_TYPE, {"serialization": serialization, "resources": resources}, private)


def verify_signature(root: Path, key: Path, manifest: Mapping[str, Any]) -> Signed:
    """What `key` signed, when it is what `root` holds by name and by the sums of `manifest`; E124 with every difference, E125 for a key
    that is none. The caller then compares the files with the manifest."""
    public, where = envelope.read_public_key(key), str(root / SIGNATURE)
    if not os.path.lexists(root / SIGNATURE):
        fix = "get the signed directory, or sign it: thoughtx-sign --engine_dir ENGINE --key KEY.pem"
        raise envelope.refused(str(root), "the engine directory is not signed", f"it holds no {SIGNATURE}", fix)
    signed = _files_of(envelope.unseal(read_inside(root, SIGNATURE, SIGNATURE_BYTES, code="E124"), public, where), where)
    if wrong := list(_differences(root, signed, manifest)):
        raise envelope.refused(str(root), "the directory is not what was signed", listed(wrong))
    return Signed(envelope.fingerprint(public), signed)


def verify(directory: EngineDir, key: Path | str | None) -> Signed | None:
    """What must pass before anything of an engine is loaded: its signature by `key`, where one is given, and its manifest."""
    signed = None if key is None else verify_signature(directory.root, Path(key), directory.manifest)
    directory.verify()
    return signed


def file_checks(directory: EngineDir, key: Path | None) -> list[Check]:
    """`verify` as checks: of the signature, where a key is given, and of the manifest."""
    checks = []
    if key is not None:
        try:
            signed = verify_signature(directory.root, key, directory.manifest)
            checks.append(Check("signature", "passed", evidence={"key": signed.key, "num_files": len(signed.files)}))
        except ThoughtxError as error:
            if error.code != "E124":
                raise
            checks.append(Check("signature", "failed", f"{error.what}: {error.why}"))
    try:
        directory.verify()
        checks.append(Check("files match the manifest", "passed", evidence={"num_files": len(directory.manifest["outputs"])}))
    except ThoughtxError as error:
        checks.append(Check("files match the manifest", "failed", f"{error.what}: {error.why}"))
    return checks


def present(root: Path) -> set[str]:
    """The names in a directory that its signature must cover."""
    return {entry.name for entry in os.scandir(root)} - {SIGNATURE, *OF_GIT}


def sha256_inside(root: Path, name: str) -> str:
    digest = hashlib.sha256()
    with open_inside(root, name) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _root_digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(files[name]) for name in sorted(files))).hexdigest()


def _files_of(statement: Mapping[str, Any], where: str) -> dict[str, str]:
    """The signed sums by name, of a statement whose signature is right."""

    def malformed(why: str) -> Exception:
        return envelope.refused(where, "this is no signature of a model's files", why)

    kind, subjects, predicate = (statement.get(key) for key in ("predicateType", "subject", "predicate"))
    if kind != PREDICATE_TYPE:
        raise malformed(f"its predicateType is {shown(kind)}, not {PREDICATE_TYPE}")
    serialization = predicate.get("serialization") if isinstance(predicate, dict) else None
    resources = predicate.get("resources") if isinstance(predicate, dict) else None
    if not isinstance(serialization, dict) or not isinstance(resources, list) or not isinstance(subjects, list) or len(subjects) != 1:
        raise malformed("it needs one subject, a serialization and resources")
    form = serialization.get("method"), serialization.get("hash_type")
    if form != ("files", "sha256"):
        raise malformed(f"it has hashes of {shown(form[0])} by {shown(form[1])}; sha256 of whole files is read")
    files: dict[str, str] = {}
    for row in resources:
        name, algorithm, digest = (str(row.get(key)) if isinstance(row, dict) else "" for key in ("name", "algorithm", "digest"))
        is_sum = algorithm == "sha256" and re.fullmatch("[0-9a-f]{64}", digest)
        if not is_sum or not PLAIN_NAME.fullmatch(name) or name in files:
            raise malformed(f"the resource {shown(row)} needs a plain file name of its own and a sha256")
        files[name] = digest
    subject = subjects[0].get("digest") if isinstance(subjects[0], dict) else None
    if subject != {"sha256": _root_digest(files)}:
        raise malformed("the digest of its subject is not that of its resources")
    return files


def _differences(root: Path, signed: Mapping[str, str], manifest: Mapping[str, Any]) -> Iterator[str]:
    rows = {row["name"]: row["sha256"] for row in manifest["outputs"]}
    here = present(root)
    missing, added = sorted(set(signed) - here), sorted(here - set(signed))
    sums = {name: sha256_inside(root, name) for name in added if missing and PLAIN_NAME.fullmatch(name) and (root / name).is_file()}
    for name in missing:
        new = [other for other, found in sums.items() if found == signed[name]]
        yield f"{shown(name)}: renamed to {shown(new[0])}" if new else f"{shown(name)}: removed"
        added = [other for other in added if other not in new[:1]]
    yield from (f"{shown(name)}: added, it is not signed" for name in added)
    for name in sorted(here & set(signed)):
        if name in rows and rows[name] != signed[name]:
            yield f"{shown(name)}: {MANIFEST} has another sha256 than was signed"
        elif name not in rows and sha256_inside(root, name) != signed[name]:
            yield f"{shown(name)}: changed since it was signed"
