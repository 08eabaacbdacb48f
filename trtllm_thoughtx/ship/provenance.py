"""SLSA provenance of an engine directory: which command made its files, of which inputs, with which versions. All of it stands in the
manifest; here it is said in the form that policy engines read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:trtllm-thoughtx:manifest:1"  # externalParameters: the command; internalParameters: the settings as they were resolved
BUILDER = "urn:trtllm-thoughtx:local"  # the command on somebody's host, which claims no more than that


def subjects(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The files that were made, with their sums."""
    return [{"name": row["name"], "digest": {"sha256": row["sha256"]}} for row in manifest["outputs"]]


def provenance(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The predicate of a statement about `subjects`."""
    tool, made_with = manifest["tool"], manifest["environment"]
    inputs = [{"name": row["name"], "digest": {"sha256": row["sha256"]}} for row in manifest["inputs"]]
    packages = [{"name": name, "uri": uri} for name, uri in sorted(purls(manifest).items())]
    host = {key: str(made_with[key]) for key in ("python", "system", "machine") if key in made_with}
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"command": manifest["command"]},
            "internalParameters": {"config": manifest["config"], "host": host},
            "resolvedDependencies": [*inputs, *packages],
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": {str(tool.get("name")): str(tool.get("version"))}},
            "metadata": {"finishedOn": manifest["created"].replace("+00:00", "Z")},
        },
    }


def purls(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Package URLs of what the manifest's versions name, by package."""
    versions = {name: str(version) for name, version in manifest["environment"].items() if name not in ("python", "system", "machine")}
    known = {name: version for name, version in versions.items() if version != "not installed"}
    return {name: f"pkg:pypi/{name.lower().replace('_', '-')}@{version.replace('+', '%2B')}" for name, version in known.items()}
