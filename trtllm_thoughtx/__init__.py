"""trtllm-thoughtx: distilled reasoning checkpoints in, engines that can be shipped out."""

from trtllm_thoughtx.process.outside import keep_in

keep_in()
__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]

TYPE_CHECKING = False  # typing's own takes longer to import than all of this
if TYPE_CHECKING:
    from trtllm_thoughtx.runtime.engine import Engine


def __getattr__(name: str) -> object:
    """`from trtllm_thoughtx import Engine` without making every import pay for the runtime."""
    if name == "Engine":
        from trtllm_thoughtx.runtime.engine import Engine

        return Engine
    raise AttributeError(name)
