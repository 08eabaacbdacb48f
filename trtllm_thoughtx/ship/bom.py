"""CycloneDX 1.6 bill of materials of an engine directory: the model and its card's facts, every file with its sha256, what it was made of
and the packages that made it. From the manifest and config.json alone; the same engine gives the same bill, serial number included.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from trtllm_thoughtx.config import BuildConfig, ModelConfig
from trtllm_thoughtx.ship.provenance import purls

NAMESPACE = uuid.UUID("5f3c2a0e-6d52-5d4e-9a61-1f0d8a3c9b74")  # of our serial numbers


def bill(name: str, digest: str, manifest: Mapping[str, Any], config: ModelConfig, build: BuildConfig) -> dict[str, Any]:
    """Of the engine `name`, whose manifest has the sha256 `digest`."""
    tool = manifest["tool"]
    files = [_file(row, f"file:{row['name']}") for row in manifest["outputs"]]
    inputs = [_file(row, f"input:{row['name']}") for row in {row["name"]: row for row in manifest["inputs"]}.values()]
    packages = [
        {"type": "library", "bom-ref": uri, "name": package, "version": str(manifest["environment"][package]), "purl": uri}
        for package, uri in sorted(purls(manifest).items())
    ]
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "engine",
        "name": name,
        "version": digest[:12],
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": config.family,
                "modelArchitecture": config.architecture,
                "inputs": [{"format": "token ids"}],
                "outputs": [{"format": "logits"}],
            }
        },
        "properties": _properties(config, build, manifest["command"]),
    }
    if licenses := [row["name"] for row in manifest["outputs"] if row["name"].startswith("LICENSE")]:
        model["licenses"] = [{"license": {"name": f"see {licenses[0]}"}}]
    parts = [*files, *inputs, *packages]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": manifest["created"],
            "tools": {"components": [{"type": "application", "name": str(tool.get("name")), "version": str(tool.get("version"))}]},
            "component": model,
        },
        "components": parts,
        "dependencies": [
            {"ref": "engine", "dependsOn": [one["bom-ref"] for one in files]},
            *({"ref": one["bom-ref"], "dependsOn": [source["bom-ref"] for source in (*inputs, *packages)]} for one in files),
        ],
    }


def _file(row: Mapping[str, Any], ref: str) -> dict[str, Any]:
    size = [{"name": "thoughtx:bytes", "value": str(row["bytes"])}]
    return {
        "type": "file",
        "bom-ref": ref,
        "name": row["name"],
        "hashes": [{"alg": "SHA-256", "content": row["sha256"]}],
        "properties": size,
    }


def _properties(config: ModelConfig, build: BuildConfig, command: str) -> list[dict[str, str]]:
    quant = config.quantization
    facts = {
        "command": command,
        "backends": ", ".join(build.backends),
        "dtype": build.dtype,
        "quantization": quant.algo if quant is not None else None,
        "kv_cache": quant.kv_algo if quant is not None else None,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_batch_size": build.max_batch_size,
        "max_seq_len": build.max_seq_len,
        "chunk_size": build.chunk_size or None,
    }
    return [{"name": f"thoughtx:{name}", "value": str(value)} for name, value in facts.items() if value is not None]
