"""The rules of the house, as tests: imports flow one way, files are opened at the doors, the documentation names what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import click
import pytest
from places import ROOT

from trtllm_thoughtx.errors import CODES

PACKAGE = ROOT / "trtllm_thoughtx"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if ".mypy_cache" not in path.parts)
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
LIMIT_LINES = 400
BUDGET = 33886  # lines of the package; whoever adds a feature raises it knowingly, and a change that adds none does not
LIMIT_ENTRIES = 31  # at the top of the package
CODE_OF = {"eval": "evaluate", "inspect": "inspection"}  # commands whose own name would hide Python's

# A file imports from its own row and the rows above it.
LAYERS = (
    ("__init__", "errors", "config", "process", "plugins"),
    ("strictjson", "progress", "tasks"),
    ("files",),
    ("jsonl", "report", "plot"),
    ("families",),
    ("checkpoint",),
    ("graph",),
    ("backends",),
    ("text",),
    ("build",),
    ("ship",),
    ("runtime", "inspection"),
    ("validate",),
    ("bench",),
    ("evaluate",),
    ("distill",),
    ("calibrate",),
    ("serve",),
    ("release",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# file -> why it reads something that does not come through files.py
READERS = {
    "files.py": "it is the door",
    "calibrate/quantize/states.py": "its own states between two layers",
    "cli/params.py": "writes the traceback of a bug; points stdout at the null device",
    "runtime/answers.py": "appends to the answers that it wrote",
    "distill/loop.py": "appends to its own log",
    "distill/sample.py": "its own log and its own times",
    "backends/tensorrt.py": "passes the weights that this build wrote to the builder's process",
    "backends/trt_builder.py": "the kernel's account of its own memory use",
    "graph/external.py": "reads back the weights that this build wrote",
    "evaluate/memory.py": "the kernel's account of its own memory use",
    "validate/data_loader.py": "it is copied to hosts without this package",
    "release/store.py": "its own locks; a directory that is synced",
    "process/machine.py": "the kernel's memory table",
}
STEPPERS = ("runtime/", "validate/polygraphy.py")  # what feeds tokens to a session; all else has `Engine.complete` and its kin
RUNTIMES = {
    "onnxruntime": "backends/",
    "tensorrt": "backends/",
    "tensorrt_rtx": "backends/",
    "torch": ("validate/reference.py", "validate/merging.py", "evaluate/models.py", "distill/", "calibrate/"),
    "transformers": ("validate/reference.py", "evaluate/models.py", "distill/"),
    "peft": ("validate/merging.py", "distill/"),
    "trl": "distill/",
    "datasets": ("distill/", "calibrate/data.py"),
    "accelerate": "distill/",
    "lm_eval": "evaluate/harness.py",
    "starlette": "serve/",
    "uvicorn": "serve/",
    "prometheus_client": "serve/",
    "matplotlib": "plot.py",
    "ray": "release/on_ray.py",
    "cryptography": "ship/envelope.py",
    "tensorrt_llm": "runtime/trtllm.py",
}


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module as a dotted name, `from package import name` with its name, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _noun(dotted: str) -> str:
    """First part below the package, `__init__` for the package itself."""
    first = dotted.removeprefix("trtllm_thoughtx").lstrip(".").partition(".")[0]
    return first if first in LEVEL else "__init__"


def test_every_file_has_a_place():
    nouns = {name.partition("/")[0].removesuffix(".py") for name in TREES}
    assert nouns == set(LEVEL), "add the file to LAYERS, at the place where it belongs"


@pytest.mark.parametrize("name", TREES)
def test_imports_flow_one_way(name):
    own = LEVEL[name.partition("/")[0].removesuffix(".py")]
    if name == "__init__.py":
        return  # offers Engine lazily, see its __getattr__
    wrong = [
        f"line {line}: {dotted}"
        for dotted, line in _imports(TREES[name])
        if dotted.startswith("trtllm_thoughtx") and LEVEL[_noun(dotted)] > own
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("folder", sorted({name.rpartition("/")[0] for name in TREES}))
def test_no_imports_form_a_circle_inside_a_folder(folder):
    """Imports for type checkers alone and those inside functions count as well."""
    dotted = {name.removesuffix(".py").replace("/", "."): name for name in TREES if name.rpartition("/")[0] == folder}
    reached = {
        name: {
            other
            for found, _ in _imports(TREES[name])
            for module, other in dotted.items()
            if f"{found}.".startswith(f"trtllm_thoughtx.{module}.")
        }
        for name in dotted.values()
    }
    for _ in dotted:  # as far as a chain can go
        reached = {name: direct | {far for near in direct for far in reached[near]} for name, direct in reached.items()}
    assert {name for name, others in reached.items() if name in others} == set()


def _borrowed(tree: ast.Module) -> set[str]:
    """Names of a module that it has from others."""
    return {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize("name", TREES)
def test_names_are_imported_from_the_module_that_defines_them(name):
    modules = {f"trtllm_thoughtx.{path.removesuffix('.py').replace('/', '.')}": _borrowed(tree) for path, tree in TREES.items()}
    wrong = [
        f"line {line}: {dotted}"
        for dotted, line in _imports(TREES[name])
        if dotted.rpartition(".")[2] in modules.get(dotted.rpartition(".")[0], ()) and "cli.commands" not in dotted
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("name", TREES)
def test_runtimes_stay_in_their_place(name):
    wrong = []
    for dotted, line in _imports(TREES[name]):
        top = dotted.partition(".")[0]
        assert top not in ("pickle", "marshal", "shelve", "dill"), f"{name} line {line}: {top}"
        if top in RUNTIMES and not name.startswith(RUNTIMES[top]):
            wrong.append(f"line {line}: {dotted}")
    assert not wrong, wrong


def _reads(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Calls that open a file for reading, or could: writing into a directory of our own is not meant."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        modes = [
            arg.value
            for arg in (*node.args, *(word.value for word in node.keywords))
            if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ]
        writes = any(re.fullmatch(r"[wx]b?", mode) for mode in modes)
        is_open = called in ("open", "io.open", "os.open", "os.fdopen") or (
            called.endswith(".open") and not called.split(".")[-2][:1].isupper()
        )
        is_reader = re.search(
            r"\.(read_text|read_bytes|memmap|fromfile|loadtxt)$|^(np|numpy|torch|json|pickle|onnx|safe_open)\.load$", called
        )
        if (is_open and not writes) or is_reader:
            yield called, node.lineno


@pytest.mark.parametrize("name", TREES)
def test_files_are_opened_at_the_door(name):
    found = [f"line {line}: {called}" for called, line in _reads(TREES[name])]
    assert not found or name in READERS, f"use files.open_inside or files.read_named: {found}"


def test_the_list_of_readers_is_not_longer_than_needed():
    assert [name for name in READERS if name not in TREES or not list(_reads(TREES[name]))] == []


def test_the_door_check_sees_what_it_must():
    bad = "open(p)\nPath(p).read_text()\nos.open(p, 0)\nnp.load(p)\np.open('rb')\n(a / b).read_bytes()\ntorch.load(p)\nonnx.load(p)"
    assert len(list(_reads(ast.parse(bad)))) == 8
    assert list(_reads(ast.parse("p.open('xb')\nopen(p, 'w')\nEngineDir.open(p)"))) == []


@pytest.mark.parametrize("name", TREES)
def test_files_are_small_and_say_what_they_are(name):
    text = (PACKAGE / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LIMIT_LINES
    assert not text.strip() or ast.get_docstring(TREES[name]), "a docstring at the top says what the file does and why"


def test_many_requests_run_in_one_way():
    """Over the slots: only the runtime makes a `Generation` or steps a session, so that evaluation, lm-eval, calibration, jobs and the
    server cannot have batches of their own."""
    wrong = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or name.startswith(STEPPERS):
                continue
            called = node.func
            is_made = isinstance(called, ast.Name) and called.id in ("Generation", "Batch", "Scheduler", "Slots")
            is_fed = isinstance(called, ast.Attribute) and called.attr in ("step", "call", "extend", "run_parts", "begin")
            of_session = is_fed and isinstance(called.value, ast.Attribute | ast.Name) and "session" in ast.unparse(called.value)
            if is_made or of_session:
                wrong.append(f"{name}:{node.lineno}: {ast.unparse(called)}")
    assert not wrong, wrong
    assert "engine.complete(" in (PACKAGE / "evaluate" / "systems.py").read_text(encoding="utf-8")


def test_scripts_are_small():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "bench").rglob("*.py")}
    assert len(lines) > 20 and {name: num for name, num in lines.items() if num > LIMIT_LINES} == {}


def test_the_package_stays_within_its_budget():
    num_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert num_lines <= BUDGET, "say in the commit what the lines are for, and raise the budget"


def test_the_top_of_the_package_can_be_taken_in_at_a_glance():
    names = [path.name for path in PACKAGE.iterdir() if not path.name.startswith((".", "__pycache__"))]
    assert len(names) <= LIMIT_ENTRIES, sorted(names)


def test_the_name_of_a_command_leads_to_its_code():
    from trtllm_thoughtx.cli import commands as cli

    places = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert [name for name in cli.COMMANDS if CODE_OF.get(name, name) not in places] == []


def test_no_test_imports_from_a_test():
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        wrong += [
            f"{path.name}: {name}" for name in names if name.rpartition(".")[2].startswith(("test_", "conftest")) or name[:6] == "tests."
        ]
    assert wrong == [], "what two tests share is in tests/helpers"


def test_no_test_waits_for_so_many_seconds():
    """A limit on wall-clock time fails on a busy machine; what hangs, conftest.py ends."""
    words = re.compile(r"timeout=\d|perf_counter|monotonic\(|time\.time\(")
    found = [
        path.name for path in sorted((ROOT / "tests").rglob("*.py")) if path.name != "test_house.py" and words.search(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "path",
    [*FILES, *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("build_configs/**/*.yaml"))],
    ids=lambda path: path.name,
)
def test_no_path_of_some_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(work|tmp|home|root|mnt|Users)\b", text)


def test_every_error_code_is_documented_and_used():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (E\d{3}) \| \d+ \| (.+?) \|$", page, re.MULTILINE))
    assert rows == {code: meaning for code, (_, meaning) in CODES.items()}
    exits = {code: int(status) for code, status in re.findall(r"^\| (E\d{3}) \| (\d+) \|", page, re.MULTILINE)}
    assert exits == {code: int(status) for code, (status, _) in CODES.items()}
    source = "".join(path.read_text(encoding="utf-8") for path in FILES if path.name != "errors.py")
    assert [code for code in CODES if f'"{code}"' not in source] == []


def test_every_recipe_parses():
    from trtllm_thoughtx.cli import commands as cli
    from trtllm_thoughtx.cli.recipe import read_recipe

    recipes = sorted(ROOT.glob("build_configs/*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        command = cli.distill if path.name.startswith("distill-") else cli.run_command if path.stem.endswith("-batch") else cli.build
        context = click.Context(command, info_name=f"thoughtx-{command.name}")
        settings = read_recipe(path, command, context, cli.COMMANDS.values())
        assert settings, path.name
        context.default_map = settings
        for param in command.params:  # click itself takes every value
            if param.name in settings:
                assert param.type_cast_value(context, settings[param.name]) is not None


def test_every_recipe_resolves():
    """Each recipe fits the model that its name says."""
    from trtllm_thoughtx.build.options import resolve
    from trtllm_thoughtx.cli import commands as cli
    from trtllm_thoughtx.cli.recipe import read_recipe
    from trtllm_thoughtx.config import ModelConfig, RopeConfig

    layers = {"thoughtx-tiny": 8, "qwen2.5-0.5b": 24, "qwen2.5-7b": 28}
    for path in sorted(set(ROOT.glob("build_configs/[!d]*.yaml")) - set(ROOT.glob("build_configs/*-batch.yaml"))):
        context = click.Context(cli.build, info_name="thoughtx-build")
        settings = read_recipe(path, cli.build, context, ())
        flat = {p.name: p.type_cast_value(context, settings[p.name]) for p in cli.build.params if p.name in settings}
        flat["backend"] = tuple(name for names in flat["backend"] for name in names)
        num_layers = next(count for name, count in layers.items() if path.name.startswith(name))
        model = ModelConfig(
            family="qwen2",
            architecture="Qwen2ForCausalLM",
            dtype="bfloat16",
            vocab_size=1000,
            hidden_size=64,
            intermediate_size=128,
            num_layers=num_layers,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            norm_eps=1e-6,
            rope=RopeConfig(theta=1e6),
            max_position=1024 if num_layers == 8 else 32768,
            tied=True,
            qkv_bias=True,
            o_bias=False,
            qk_norm=False,
        )
        assert resolve(model, flat).max_seq_len == settings["max_seq_len"]


def test_declared_dependencies_cover_the_imports():
    """Whatever the package imports from outside is a dependency or belongs to an extra."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = {name.lower().replace("-", "_") for name in re.findall(r'"([A-Za-z][\w-]*)(?:[<>=\[]|")', text)}
    alias = {"yaml": "pyyaml", "google": "onnx", "cuda": "cuda_python"}
    outside = {dotted.partition(".")[0] for tree in TREES.values() for dotted, _ in _imports(tree)} - set(sys.stdlib_module_names)
    missing = sorted(name for name in outside - {"trtllm_thoughtx"} if alias.get(name, name).lower() not in declared)
    assert not missing


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    script = "import sys, hatchling.build as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"trtllm_thoughtx"}
    assert "trtllm_thoughtx/samples/thoughtx-tiny/model.safetensors" in names
    assert "trtllm_thoughtx/build_configs/thoughtx-tiny.yaml" in names
    assert "trtllm_thoughtx/plugins/chunked_attention/resources.json" in names
    assert not [name for name in names if "cache" in name]
