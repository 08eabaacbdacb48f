"""A stand-in for the package's commands in tests of releases: its output depends on its words and its inputs alone.

--output_dir DIR   where it writes      --input DIR   what it reads        --note FILE   a line for every start
--until FILE       waits for it         --fail CODE   a refusal, as long as there is no file of its name in the log's directory
--die              kills itself the first time
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    name, *words = sys.argv[1:]
    values: dict[str, list[str]] = {}
    for flag, value in itertools.pairwise(words):
        if flag.startswith("--"):
            values.setdefault(flag, []).append(value)
    note = Path(values["--note"][0])
    label = Path(values["--output_dir"][0]).name
    with note.open("a") as log:
        log.write(f"{name} {label} {os.getpid()}\n")
    for path in values.get("--until", ()):
        while not Path(path).exists():
            time.sleep(0.01)
    told = note.parent / f"told-{name}-{label}"
    if "--die" in words and not told.exists():
        told.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    for code in values.get("--fail", ()):
        if not (note.parent / code).exists():
            (note.parent / code).touch()
            error = {"code": code, "what": "no", "where": "here", "why": "because", "fix": "none"}
            print(json.dumps({"ok": False, "error": error}))
            return 4
    digest = hashlib.sha256(name.encode())
    for path in values.get("--input", ()):
        digest.update((Path(path) / "data").read_bytes())
    out = Path(values["--output_dir"][0])
    out.mkdir()
    (out / "data").write_text(digest.hexdigest())
    print(json.dumps({"ok": True, "date": os.environ.get("SOURCE_DATE_EPOCH")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
