"""trtllm-thoughtx: distilled reasoning checkpoints in, engines that can be shipped out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_thoughtx.outside import keep_in

keep_in()
__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]

if TYPE_CHECKING:
    from trtllm_thoughtx.runtime.engine import Engine


def __getattr__(name: str) -> object:
    """`from trtllm_thoughtx import Engine` without making every import pay for the runtime."""
    if name == "Engine":
        from trtllm_thoughtx.runtime.engine import Engine

        return Engine
    raise AttributeError(name)
