"""hatchling's hook: a wheel gets `plugins/chunked_attention` under the package's name; an editable install finds it by itself.

hatchling cannot do both by configuration: its `sources` may rename a prefix in a wheel, and refuses to in an editable install.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["plugins/chunked_attention"] = "trtllm_thoughtx/plugins/chunked_attention"
