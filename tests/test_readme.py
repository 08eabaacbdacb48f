"""The marked blocks of the README, then those of each page in docs/, are run in one directory, exactly as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"<!-- run -->\n```(bash|python)\n(.*?)```", page, re.DOTALL)]
OTHERS = {"system", "tokenizer", "use_fused_mlp"}  # flags of other tools that a page names alone
NAMES = ("convert", "calibrate", "build", "validate", "run", "bench", "sign", "export", "inspect", "eval", "distill", "serve")


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A directory that looks like the repository, and an environment in which the installed scripts are this source tree."""
    top = tmp_path_factory.mktemp("readme")
    work, scripts = top / "work", top / "bin"
    work.mkdir()
    scripts.mkdir()
    for name in ("trtllm_thoughtx", "build_configs"):
        (work / name).symlink_to(ROOT / name, target_is_directory=True)
    for name in NAMES:
        script = scripts / f"thoughtx-{name}"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trtllm_thoughtx {name} "$@"\n')
        script.chmod(0o755)
    return work, {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 5
    assert sum(page.count("<!-- run -->") for page in PAGES.values()) == len(BLOCKS)


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 150
    assert [name for name in PAGES if name != "README.md" and name not in README] == []


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    base = ROOT / ("docs" if (ROOT / "docs" / name).exists() else "")
    targets = re.findall(r"\]\(([^)#]+)", PAGES[name])
    assert [target for target in targets if not target.startswith("http") and not (base / target).exists()] == []


@pytest.mark.slow
@pytest.mark.rtx
def test_the_blocks_run(shell):
    pytest.importorskip("tensorrt_rtx", reason="the README builds a TensorRT-RTX engine")
    pytest.importorskip("transformers", reason="the README compares with transformers")
    work, environment = shell
    outputs = []
    for language, text in BLOCKS:
        words = ["bash", "-eu", "-o", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    assert outputs[0].rstrip().endswith("</think> 13") and "PASSED" in outputs[0]
    python = next(output for (language, _), output in zip(BLOCKS, outputs, strict=True) if language == "python")
    assert python.rstrip().endswith("</think> 13 eos")
    made = {path.name for path in work.iterdir() if not path.is_symlink()}
    assert {"ckpt", "engine", "engine-from-recipe", "engine-in-stages", "golden.safetensors", "report.xml", "logits.npy"} <= made


def test_the_first_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE) + re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_that_the_pages_name_exists():
    for page in PAGES.values():
        for name in re.findall(r"`((?:tests|bench|build_configs|docs|plugins)/[\w./-]*|constraints\.txt)`", page):
            assert (ROOT / name).exists(), name


def test_every_line_of_production_was_run_or_says_why_not():
    for marked, block in re.findall(r"(<!-- run -->\n)?```bash\n(.*?)```", PAGES["production.md"], re.DOTALL):
        lines = block.replace("\\\n", "").splitlines()
        assert marked or [line for line in lines if not re.search(r"# not run: (GPU|registry|Triton)$", line)] == []
    assert PAGES["production.md"].count("<!-- run -->") >= 9


def commands_in(page: str) -> Iterator[tuple[str, str]]:
    """Commands of this package that a page types: the name, and its flags' text, as far as the command goes."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for text in (*lines, *spans):
        yield from re.findall(r"thoughtx[- ]([a-z]+)((?:(?!thoughtx[- ][a-z]|[|;&#)]).)*)", " ".join(text.split()))


@pytest.mark.parametrize("name", PAGES)
def test_the_flags_that_pages_name_exist(name):
    from trtllm_thoughtx.cli.commands import COMMANDS

    flags = {
        one: {option.lstrip("-").replace("-", "_") for param in command.params for option in (*param.opts, *param.secondary_opts)}
        | {"help"}
        for one, command in COMMANDS.items()
    }
    page, wrong = PAGES[name], []
    for command, rest in commands_in(page):
        if command in flags:
            wrong += [f"{command} --{flag}" for flag in re.findall(r"(?<![\w-])--([a-z]\w*)", rest) if flag not in flags[command]]
    every = set().union(*flags.values()) | OTHERS
    alone = re.findall(r"(?<!`)`--([a-z][\w-]*)", page)  # without a command: of any
    assert wrong + [flag for flag in alone if flag.replace("-", "_") not in every] == []


def test_the_walk_over_flags_sees_what_it_must():
    page = "`thoughtx-run --a x`\n```bash\nthoughtx-eval --b \\\n  --c | thoughtx bench --d  # --e\n```\n"
    assert [(name, rest.split()) for name, rest in commands_in(page)] == [
        ("eval", ["--b", "--c"]),
        ("bench", ["--d"]),
        ("run", ["--a", "x"]),
    ]


def test_the_exit_statuses_are_the_ones_of_the_program():
    from trtllm_thoughtx.errors import Exit

    section = PAGES["errors.md"].split("| code |")[0]
    assert [int(status) for status in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)] == [int(status) for status in Exit]
