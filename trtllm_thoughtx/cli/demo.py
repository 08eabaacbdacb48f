"""`make demo`: the whole way on a machine without a GPU, with the checkpoint that comes in the package.

Every step is one installed command, printed as one would type it and run as a process of its own; the first that fails ends
the demo with its status. What was made and what was proved is read back from the files that the commands wrote, not from
memory. All output goes to ./demo-out. A second run finds checkpoint and engine up to date, and compares the engine with the values
that the first run recorded from PyTorch.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

from trtllm_thoughtx import files, report
from trtllm_thoughtx.errors import Exit
from trtllm_thoughtx.process import interrupt
from trtllm_thoughtx.text.answer import split_text
from trtllm_thoughtx.text.tokens import THINK_TAGS

SAMPLE = Path(__file__).parents[1] / "samples" / "thoughtx-tiny"
QUESTION, ANSWER = "x1 = 38 x2 = 75 x3 = 09 ?", "22"  # the sample adds modulo 100


class StepFailed(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def _near(path: Path) -> str:
    """`path` as one would type it here."""
    try:
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    except ValueError:
        return str(path)


def _run(console: Console, title: str, *words: str, capture: bool = False) -> str:
    """Run one installed command; its output goes to the terminal, and is returned as well with `capture`."""
    console.print(f"\n[bold]{title}[/bold]", highlight=False)
    console.print(f"$ {shlex.join(words)}", markup=False, highlight=False, soft_wrap=True, style="cyan")
    installed = Path(sys.executable).parent / words[0]
    start = [str(installed)] if installed.exists() else [sys.executable, "-m", "trtllm_thoughtx", words[0].partition("-")[2]]
    began = time.perf_counter()
    done = subprocess.run([*start, *words[1:]], stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if capture:
        console.print(done.stdout.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
    if done.returncode != Exit.OK:
        raise StepFailed(done.returncode)
    console.print(f"({time.perf_counter() - began:.1f} s)", style="dim", highlight=False)
    return done.stdout or ""


def _make(console: Console, title: str, output: Path, *words: str) -> bool:
    """Run a command that makes `output`, again with --force if an older one is in its way. True when `output` is new."""
    manifest = output / report.MANIFEST
    before = files.sha256_of(manifest) if manifest.is_file() else None
    try:
        _run(console, title, *words)
    except StepFailed as failed:
        if failed.status != Exit.REFUSED or not output.exists():
            raise
        _run(console, "What is there was made otherwise: make it again", *words, "--force")
    return files.sha256_of(manifest) != before


def _made(directories: list[Path]) -> list[list[object]]:
    rows: list[list[object]] = []
    for root in directories:
        listed = report.read_manifest(root)["outputs"]
        rows += [[f"{_near(root)}/{row['name']}", files.human_bytes(row["bytes"]), row["sha256"][:12]] for row in listed]
    return rows


def _answered(completion: str) -> str:
    """The first word behind the thinking, by the tags that stand there."""
    tags = next((tags for tags in THINK_TAGS if tags[1] in completion), THINK_TAGS[0])
    words = (split_text(completion, tags, is_open=True)[1] or "").split()
    return words[0] if words else "nothing"


def _proved(junit: Path, completion: str) -> tuple[list[list[object]], bool]:
    cases = list(ElementTree.fromstring(files.read_named(junit, 16 << 20)))
    skipped = [(case.get("name"), found.get("message")) for case in cases if (found := case.find("skipped")) is not None]
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    said = _answered(completion)
    unchecked: list[list[object]] = [[f"not checked here: {name}", reason] for name, reason in skipped]
    rows: list[list[object]] = [
        ["checks against PyTorch passed", len(cases) - len(skipped) - len(failed)],
        ["checks failed", f"{len(failed)} {', '.join(map(str, failed))}".strip()],
        *unchecked,
        [f"answer to {QUESTION!r}", f"{said} ({'correct' if said == ANSWER else f'wrong, it is {ANSWER}'})"],
    ]
    return rows, said == ANSWER and not failed


def main() -> int:
    console = Console(markup=True, emoji=False)
    out = Path.cwd() / "demo-out"
    out.mkdir(exist_ok=True)
    sample, checkpoint, engine, junit = _near(SAMPLE), _near(out / "checkpoint"), _near(out / "engine"), _near(out / "validate.xml")
    began = time.perf_counter()
    try:
        convert = f"thoughtx-convert --model_dir {sample} --output_dir {checkpoint}".split()
        _make(console, "1/6 Convert to a TensorRT-LLM checkpoint", out / "checkpoint", *convert)
        build = f"thoughtx-build --checkpoint_dir {checkpoint} --output_dir {engine} --use_chunked_attention".split()
        is_new = _make(console, "2/6 Build the engine (no GPU needed)", out / "engine", *build)
        recorded = out / "golden.safetensors"
        against = f"--golden {_near(recorded)}"
        if is_new or not recorded.exists():
            recorded.unlink(missing_ok=True)
            against = f"--reference {sample} --record {_near(recorded)}"
        validate = f"thoughtx-validate --engine_dir {engine} {against} --junit {junit}"
        _run(console, "3/6 Compare it with PyTorch", *validate.split())
        run = ["thoughtx-run", "--engine_dir", engine, "--prompt", QUESTION]
        completion = _run(console, "4/6 Ask it something", *run, capture=True)
        held_out = f"thoughtx-eval --engine_dir {engine} --task chain,lookup,story,loan --num_items 12 --batch_size 4 --max_new_tokens 200"
        _run(console, "5/6 Let it answer questions that training has not seen", *held_out.split())
        _run(console, "6/6 Look inside", "thoughtx-inspect", engine)
    except StepFailed as failed:
        console.print(f"the demo ends here: the command above returned {failed.status}", style="red")
        return failed.status
    rows, is_right = _proved(Path(junit), completion)
    console.print()
    console.print(report.table("What was made", ["file", "size", "sha256"], _made([out / "checkpoint", out / "engine"])))
    console.print(report.table("What was proved", ["claim", "result"], rows))
    console.print(f"done in {time.perf_counter() - began:.0f} s", highlight=False)
    return int(Exit.OK if is_right else Exit.NO)


if __name__ == "__main__":
    interrupt.guard()
    sys.exit(main())
