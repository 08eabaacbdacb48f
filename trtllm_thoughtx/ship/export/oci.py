"""`thoughtx-export --oci`: an engine directory as an OCI image layout (oci-layout, index.json, blobs), which registries take.

The artifact is a CNCF ModelPack: a model manifest whose layers are the files as they are, each under its own name and kind (weights, their
configuration, code, documents), and a configuration that says what the model is. Nothing is packed or compressed, so a layer's digest is
the sha256 that manifest.json and the signature state. The same directory gives the same bytes, and so the same digest to deploy by.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import atomic_dir, check_output, require_space
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.ship.export.contents import checked_names, copy, num_bytes
from trtllm_thoughtx.ship.sign import MADE

TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
LAYER_TYPE = "application/vnd.cncf.model.{}.v1.raw"
WEIGHTS, CODE = (".data", ".engine", ".onnx"), (".so",)
DOCUMENTS = ("LICENSE", "NOTICE", *MADE)


def export_oci(
    engine_dir: Path, target: Path, *, tag: str = "latest", verify_key: Path | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Write the layout to the new directory `target`, where the artifact is called `tag`. E120, E121 and E124 for an engine that is not as
    it was built and signed, E130 for a target that cannot be written or a directory that holds other files."""
    if not TAG.fullmatch(tag):
        why, fix = "a tag has letters, digits, dots, dashes and underscores, at most 128", "choose another --tag"
        raise ThoughtxError("E001", f"{shown(tag)} is no tag", where="--tag", why=why, fix=fix)
    check_output(target, force=False, inputs=[engine_dir])
    directory = EngineDir.open(Path(engine_dir))
    manifest, names = directory.manifest, checked_names(directory, verify_key)
    total = num_bytes(directory, names)
    require_space(target.absolute().parent, total + (1 << 20))
    with atomic_dir(target, force=False) as partial:
        blobs = partial / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        with progress.stage("copying", total, "bytes") as stage:
            layers = [_layer(directory, name, blobs, stage) for name in names]
        config = _blob(blobs, _config(directory.root.resolve().name, layers, directory))
        model = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": MODEL_TYPE,
            "config": {"mediaType": CONFIG_TYPE, **config},
            "layers": layers,
            "annotations": {"org.opencontainers.image.created": manifest["created"]},
        }
        found = {"mediaType": MANIFEST_TYPE, **_blob(blobs, model), "artifactType": MODEL_TYPE}
        index = {
            "schemaVersion": 2,
            "mediaType": INDEX_TYPE,
            "manifests": [{**found, "annotations": {"org.opencontainers.image.ref.name": tag}}],
        }
        (partial / "index.json").write_bytes(_json(index))
        (partial / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    return {
        "engine_dir": str(engine_dir),
        "oci": str(target),
        "tag": tag,
        "digest": found["digest"],
        "layers": len(layers),
        "bytes": total,
    }


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _blob(blobs: Path, value: object) -> dict[str, Any]:
    """Store a document; what refers to it."""
    data = _json(value)
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def _layer(directory: EngineDir, name: str, blobs: Path, stage: Any) -> dict[str, Any]:
    """Copy a file as a blob."""
    partial = blobs / f"{name}.partial"
    digest, size = copy(directory, name, partial, stage)
    partial.rename(blobs / digest)
    about = {"name": name, "mode": 0o644, "uid": 0, "gid": 0, "size": size, "mtime": directory.manifest["created"], "typeflag": ord("0")}
    annotations = {
        "org.cncf.model.filepath": name,
        "org.cncf.model.file.metadata+json": json.dumps(about, sort_keys=True),
        "org.opencontainers.image.title": name,
    }
    return {"mediaType": LAYER_TYPE.format(_kind(name)), "digest": f"sha256:{digest}", "size": size, "annotations": annotations}


def _kind(name: str) -> str:
    """ModelPack's word for a file."""
    if name.endswith(WEIGHTS):
        return "weight"
    return "code" if name.endswith(CODE) else "doc" if name.startswith(DOCUMENTS) else "weight.config"


def _config(name: str, layers: list[dict[str, Any]], directory: EngineDir) -> dict[str, Any]:
    config, quant, manifest = directory.config, directory.config.quantization, directory.manifest
    facts = {
        "architecture": "transformer",
        "format": ", ".join("onnx" if backend == "onnxruntime" else backend for backend in directory.backends),
        "precision": directory.build.dtype,
        "quantization": quant.algo if quant is not None else None,
        "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
    }
    return {
        "descriptor": {
            "createdAt": manifest["created"],
            "family": config.family,
            "name": name,
            "title": f"{config.architecture} for {', '.join(directory.backends)}",
            "description": manifest["command"],
        },
        "config": {key: value for key, value in facts.items() if value is not None},
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }
