"""What lies in `plugins/` of the source tree, under this name: `trtllm_thoughtx.plugins.chunked_attention`.

A wheel holds a copy here (plugins/wheel_hook.py); in a checkout the folder itself is the place.
"""

from pathlib import Path

_SOURCES = Path(__file__).parents[2] / "plugins"
if (_SOURCES / "chunked_attention" / "kernels.py").is_file():
    __path__.append(str(_SOURCES))
