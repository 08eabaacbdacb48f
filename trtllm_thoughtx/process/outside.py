"""What the libraries underneath would do outside of a command's output, turned off before any of them is imported.

onnxruntime 1.32 writes a device id and a database of events into ~/.cache when it is imported, and looks a host up to send them;
`disable_telemetry_events()` comes too late for that. huggingface_hub reports which libraries use it. The package calls `keep_in` when it
is imported, so that programs which use it and processes that they start are covered. matplotlib and torch keep caches in the home and
temporary directories; `own_caches`, called before they are imported, gives them a directory that goes when the process ends. What the
user has set is left as it is.
"""

import atexit
import importlib.util
import os
from collections.abc import Sequence

from trtllm_thoughtx.errors import ThoughtxError

SETTINGS = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
CACHES = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # of matplotlib, torch, Triton


def keep_in() -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def need(packages: Sequence[str], what: str, *, where: str, fix: str) -> None:
    """E201 unless all of `packages` are there; none of them is imported: asked before the work that needs them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ThoughtxError("E201", what, where=where, why=f"{' and '.join(missing)} cannot be imported", fix=fix)


def own_caches() -> None:
    unset = [name for name in CACHES if name not in os.environ]
    if not unset:
        return
    import tempfile

    root = tempfile.mkdtemp(prefix="thoughtx-cache-")
    atexit.register(_remove, root, os.getpid())
    for name in unset:
        os.environ[name] = os.path.join(root, name.lower())
        os.mkdir(os.environ[name])


def _remove(root: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork
        import shutil

        shutil.rmtree(root, ignore_errors=True)
