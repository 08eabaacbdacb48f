"""Ctrl-C ends every command with status 130 and no traceback, also while Python still imports it and after it is done.

The signal comes from inside of the process, at the import of a named module: no clock decides.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from tiny import write_tiny

SITE = """
import atexit, os, sys
WHEN, LOG = {when!r}, {log!r}

def strike():
    os.kill(os.getpid(), 2)

class Hook:
    is_on = False

    def find_spec(self, name, path=None, target=None):
        Hook.is_on = Hook.is_on or name == "trtllm_thoughtx.cli.commands"  # what entry imports once it is on guard
        if Hook.is_on and LOG:
            with open(LOG, "a") as log:
                log.write(name + "\\n")
        if Hook.is_on and name == WHEN:
            strike()

sys.meta_path.insert(0, Hook())
if WHEN == "at exit":
    atexit.register(strike)
if WHEN == "in a callback":
    import weakref

    class Held:
        pass

    def drop():
        held = Held()
        keep.append(weakref.ref(held, lambda _: strike()))  # Python prints what a callback raises, and goes on

    keep = []
    def hook(event, args):
        if event == "open" and str(args[0]).endswith("manifest.json") and not keep:
            drop()

    sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trtllm_thoughtx.build.build import build

    work = tmp_path_factory.mktemp("engine")
    write_tiny(work / "m", num_layers=1, max_position=64, tokenizer=True)
    build(work / "m", work / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 32})
    return work / "e"


def struck(tmp_path: Path, start: list[str], args: list[str], *, when: str = "", log: str = "") -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(SITE.format(when=when, log=log))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *start, *args], env=environment, capture_output=True, text=True, check=False)


def assert_ended_well(done: subprocess.CompletedProcess[str], when: str) -> None:
    assert done.returncode == 130, (when, done.stderr)
    assert "interrupted: unfinished output was removed" in done.stderr, when
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr and "Error" not in done.stderr, (when, done.stderr)


AS_MODULE = ["-m", "trtllm_thoughtx"]


def as_script(name: str) -> list[str]:
    """What pip writes into an installed script."""
    (module, function) = re.findall(rf'^thoughtx-{name} = "(.*):(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    return ["-c", f"import sys\nfrom {module} import {function}\nsys.exit({function}())"]


def moments(tmp_path: Path, start: list[str], args: list[str], step: int) -> list[str]:
    """Names of modules in the order of their import, every `step`-th."""
    log = tmp_path / "log"
    done = struck(tmp_path, start, args, log=str(log))
    assert done.returncode == 0, done.stderr
    names = list(dict.fromkeys(log.read_text().split()))
    assert names[0] == "trtllm_thoughtx.cli.commands" and len(names) > 50
    return [*names[:2], *names[2:-1:step], names[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("start", [AS_MODULE, as_script("inspect")], ids=["python -m", "script"])
def test_while_the_command_is_imported(start: list[str], tmp_path: Path) -> None:
    for when in moments(tmp_path, start, ["--help"], 12):
        assert_ended_well(struck(tmp_path, start, ["--help"], when=when), when)


@pytest.mark.slow
def test_while_the_command_imports_its_runtimes(engine: Path, tmp_path: Path) -> None:
    args = ["--engine_dir", str(engine), "--input_ids", "1,2", "--max_new_tokens", "2"]
    for when in moments(tmp_path, as_script("run"), args, 30):
        assert_ended_well(struck(tmp_path, as_script("run"), args, when=when), when)


@pytest.mark.parametrize("name", ["distill", "convert", "calibrate", "build", "validate", "run", "eval", "bench", "inspect"])
def test_every_installed_command_is_on_guard(name: str, tmp_path: Path) -> None:
    assert_ended_well(struck(tmp_path, as_script(name), ["--help"], when="click"), name)


@pytest.mark.parametrize("when", ["at exit", "in a callback"])
def test_where_python_itself_would_drop_it(when: str, engine: Path, tmp_path: Path) -> None:
    assert_ended_well(struck(tmp_path, as_script("inspect"), [str(engine)], when=when), when)


def test_a_process_that_ignores_it_goes_on(engine: Path, tmp_path: Path) -> None:
    """As a shell starts what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = struck(tmp_path, as_script("inspect"), [str(engine)], when="trtllm_thoughtx.inspection")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 0, done.stderr


def test_the_library_leaves_signals_alone() -> None:
    code = "import signal, trtllm_thoughtx.cli.commands; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
