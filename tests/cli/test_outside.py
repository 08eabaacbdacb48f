"""What a command does outside of what it was asked for: nothing. No file in HOME, in the working directory or in the place for temporary
files, no name looked up, no connection, whatever the libraries below would like.

Each command is a process with an empty HOME. Native code does not use Python's sockets, so outside.c stands in front of the C library's;
an audit hook sees Python's as well.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import LONGCOT as SAMPLE
from places import ROOT, TESTS
from tiny import write_tiny

HOOK = """
import os, sys

def hook(event, args):
    if event == "socket.getaddrinfo":
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
        is_far = host not in (None, "", "localhost", "::1", os.uname().nodename) and not host.startswith("127.")
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        host = args[1][0] if isinstance(args[1], tuple) else ""
        is_far = bool(host) and host not in ("localhost", "::1") and not host.startswith("127.")
    elif event in ("socket.gethostbyname", "socket.gethostbyaddr"):
        host, is_far = args[0], True
    else:
        return
    if is_far:
        with open(os.environ["OUTSIDE_LOG"], "a") as log:
            log.write(f"python {event} {host}\\n")
        raise OSError("the test lets nothing out")

sys.addaudithook(hook)
"""
XDG = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR")


class Place:
    """An empty home, an empty working directory, an empty place for temporary files; the inputs lie elsewhere."""

    def __init__(self, work: Path, guard: Path | None) -> None:
        self.work, self.log = work, work / "outside.log"
        self.empty = {name: work / name for name in ("home", "here", "tmp", *XDG)}
        for path in (*self.empty.values(), work / "hook", work / "out"):
            path.mkdir()
        (work / "hook" / "sitecustomize.py").write_text(HOOK)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.empty["home"]),
            "TMPDIR": str(self.empty["tmp"]),
            "PYTHONPATH": f"{work / 'hook'}{os.pathsep}{ROOT}",
            **{name: str(self.empty[name]) for name in XDG},
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "OUTSIDE_LOG": str(self.log),
            **({} if guard is None else {"LD_PRELOAD": str(guard)}),
        }

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        words, env = [str(word) for word in command], self.environment | environment
        return subprocess.run(words, cwd=self.empty["here"], env=env, capture_output=True, text=True, check=False)

    def thoughtx(self, *args: str | Path) -> None:
        done = self.run(sys.executable, "-m", "trtllm_thoughtx", *args, "--quiet")
        assert done.returncode == 0, done.stderr[-3000:]

    def seen(self) -> list[str]:
        """What was left in the empty places, and what was looked for outside."""
        left = [str(path.relative_to(self.work)) for root in self.empty.values() for path in sorted(root.rglob("*"))]
        return [*left, *(self.log.read_text().splitlines() if self.log.exists() else [])]


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """outside.c compiled, or None without a compiler: then only Python's sockets are watched."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = tmp_path_factory.mktemp("guard") / "outside.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(TESTS / "cli" / "outside.c"), "-ldl"], check=True)
    return library


@pytest.fixture
def place(tmp_path: Path, guard: Path | None) -> Place:
    return Place(tmp_path, guard)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands work on, made by the commands' own functions in this process."""
    from trtllm_thoughtx.build.build import build

    work = tmp_path_factory.mktemp("made")
    write_tiny(work / "m", num_layers=2, max_position=256, tokenizer=True)
    build(work / "m", work / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 128})
    build(SAMPLE, work / "sample", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 512})
    rows = [{"passage": "Slate splits into sheets.", "question": "does slate split", "label": 1}] * 2
    (work / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "questions.jsonl").write_text(json.dumps({"prompt": "1 + 1", "answer": "2"}) + "\n")
    return work


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


REFERENCE, TRAINING = needs("torch", "transformers"), needs("torch", "transformers", "trl", "datasets", "accelerate", "matplotlib")
SMALL = "--dtype float32 --no_gradient_checkpointing --tokens_a_batch 384 --warmup_steps 1 --batch_size 8 --num_generations 4"
# Of each command one that goes through its dependencies. M: a model, E: its engine, S: a trained sample, D: data, O: where output goes.
COMMANDS = [
    pytest.param("convert --model_dir M --output_dir O/c", id="convert"),
    pytest.param("build --checkpoint_dir M --output_dir O/e --backend onnxruntime --max_seq_len 64", id="build"),
    pytest.param(
        "build --checkpoint_dir M --output_dir O/e --backend tensorrt-rtx --max_seq_len 64", id="build-rtx", marks=needs("tensorrt_rtx")
    ),
    pytest.param(
        "validate --engine_dir E --reference M --record O/g.safetensors --junit O/v.xml", id="validate-reference", marks=REFERENCE
    ),
    pytest.param("run --engine_dir E --prompt hello --max_new_tokens 4", id="run"),
    pytest.param("inspect E", id="inspect"),
    pytest.param("inspect E --preflight", id="preflight"),
    pytest.param("export --engine_dir E --oci O/oci", id="export"),
    pytest.param("bench --engine_dir E --prompt_len 4 --max_new_tokens 2 --repeats 1 --against M", id="bench-against", marks=REFERENCE),
    pytest.param(
        "eval --engine_dir S/engine --task chain --num_items 2 --max_new_tokens 8 --compare S --memory_context 32 --plot O/p.png"
        " --output O/r.json",
        id="eval-compare-plot",
        marks=[REFERENCE, needs("matplotlib")],
    ),
    pytest.param("eval --engine_dir E --dataset D/questions.jsonl --max_new_tokens 4", id="eval-dataset"),
    pytest.param("eval --engine_dir E --harness boolq --data_dir D --num_fewshot 0", id="eval-harness", marks=needs("lm_eval")),
    pytest.param("calibrate --model_dir M --output_dir O/q --qformat int8_wo --calib_size 8", id="calibrate-wo", marks=REFERENCE),
    pytest.param(
        "calibrate --model_dir S --output_dir O/q --qformat int8_sq --calib_size 8 --calib_seq_len 32 --self_traces --eval_items 1",
        id="calibrate-sq-self",
        marks=REFERENCE,
    ),
    pytest.param(
        "calibrate --model_dir S --output_dir O/q --chunk_report --context 64 --calib_size 2 --eval_items 1 --target_capture 0.5"
        " --max_task_loss 1",
        id="calibrate-chunks",
        marks=[REFERENCE, needs("matplotlib")],
    ),
    pytest.param(
        "calibrate --model_dir S --output_dir O/q --fit_exit_head --exit_layers 2 --task chain --num_items 12 --max_new_tokens 64"
        " --max_accuracy_loss 100",
        id="calibrate-exits",
        marks=REFERENCE,
    ),
    pytest.param(
        f"distill --student_dir S --teacher_dir S --output_dir O/d {SMALL} --supervised_steps 1 --preference_steps 1 --scored_steps 1"
        " --eval_items 1 --max_seq_len 128",
        id="distill",
        marks=TRAINING,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_leaves_nothing_outside_of_its_output_and_asks_nobody(line: str, made: Path, place: Place) -> None:
    names = {"M": made / "m", "E": made / "e", "S": SAMPLE, "D": made, "O": place.work / "out"}
    words = []
    for word in line.replace("S/engine", f"{made}/sample").split():
        head, slash, rest = word.partition("/")
        words.append(f"{names[head]}{slash}{rest}" if head in names else word)
    place.thoughtx(*words)
    assert place.seen() == []


def test_the_library_leaves_nothing_either(made: Path, place: Place) -> None:
    code = f"from trtllm_thoughtx import Engine; e = Engine.load({str(made / 'e')!r}); e.generate([[1, 2]]); e.close()"
    done = place.run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert place.seen() == []


@needs("triton")
def test_compiled_kernels_leave_no_cache(place: Place) -> None:
    done = place.run(sys.executable, "-m", "plugins.chunked_attention.artifacts", "--cc", "80", "--only", "combine-sm80-float16")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) >= 1 and place.seen() == []


def test_what_the_user_has_set_stays(place: Place) -> None:
    code = (
        "import os, trtllm_thoughtx; from trtllm_thoughtx.process.outside import CACHES, own_caches; own_caches();"
        "print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['MPLCONFIGDIR'], all(os.path.isdir(os.environ[c]) for c in CACHES[1:]))"
    )
    done = place.run(sys.executable, "-c", code, ORT_DISABLE_TELEMETRY="0", MPLCONFIGDIR="mine")
    assert done.stdout.split() == ["0", "mine", "True"], done.stderr
    assert place.seen() == []


def test_the_guard_sees_native_code_and_python(place: Place, guard: Path | None) -> None:
    python = "import socket; socket.socket().connect(('192.0.2.1', 80))"
    assert place.run(sys.executable, "-c", python).returncode != 0
    assert "python socket.connect 192.0.2.1" in place.log.read_text()
    if guard is None:
        pytest.skip("no C compiler: native code is not watched here")
    native = "import ctypes; p = ctypes.c_void_p(); assert ctypes.CDLL(None).getaddrinfo(b'example.invalid', None, None, ctypes.byref(p))"
    assert place.run(sys.executable, "-c", native).returncode == 0
    assert "getaddrinfo example.invalid" in place.log.read_text()


def test_onnxruntime_by_itself_would_leave_something(place: Place) -> None:
    """The test above could fail: this is what it keeps away. Versions that do not do it need no guard."""
    done = place.run(sys.executable, "-c", "import onnxruntime; print(onnxruntime.__version__)")
    if tuple(map(int, done.stdout.split(".")[:2])) < (1, 32):
        pytest.skip(f"onnxruntime {done.stdout.strip()} has no telemetry on Linux")
    assert any("onnxruntime" in name for name in place.seen())
