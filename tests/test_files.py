"""The doors: what may be opened, what JSON is let in, and that outputs appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_thoughtx import files
from trtllm_thoughtx.errors import Exit, ThoughtxError
from trtllm_thoughtx.strictjson import JSON_DEPTH, parse_json


def code_of(action, *args, **kwargs) -> str:
    with pytest.raises(ThoughtxError) as caught:
        action(*args, **kwargs)
    assert caught.value.what and caught.value.where and caught.value.why and caught.value.fix
    return caught.value.code


# --- open_inside -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.json").write_bytes(b"inside")
    (tmp_path / "secret.json").write_bytes(b"outside")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "a.json").write_bytes(b"sibling")
    return root


def content(root: Path, name: str) -> bytes:
    with files.open_inside(root, name) as handle:
        return handle.read()


@pytest.mark.parametrize(
    "name",
    [
        *["", ".", "..", "../secret.json", "/etc/passwd", "a/../../secret.json", "./a.json", "sub/a.json", "..\\secret.json", "C:a.json"],
        *["~", "a.json\n", "a.json\0", "\x1b[2J", "x" * 300, ".hidden", "-rf", "a b", "mod\u00e8le.json", "\udcff", None, 7, b"a.json"],
    ],
)
def test_names_that_are_not_plain(tree: Path, name) -> None:
    assert code_of(files.open_inside, tree, name) == "E104"


def test_plain_names(tree: Path) -> None:
    assert content(tree, "a.json") == b"inside"
    assert code_of(files.open_inside, tree, "b.json") == "E101"
    assert code_of(files.open_inside, tree / "none", "a.json") == "E101"
    assert code_of(files.open_inside, tree / "a.json", "a.json") == "E101"
    assert code_of(files.open_inside, tree / "a\0b", "a.json") == "E101"
    assert code_of(files.open_named, tree / "a\0b") == "E101"


@pytest.mark.parametrize(
    "target", ["../secret.json", "../root-2/a.json", "loop.json", "/dev/zero", "/dev/null", ".", "/etc/hostname", "/proc/self/mem"]
)
def test_links_that_lead_astray(tree: Path, target: str) -> None:
    (tree / "loop.json").symlink_to(target)
    assert code_of(files.open_inside, tree, "loop.json") == "E104"


def test_links_that_stay(tree: Path) -> None:
    (tree / "soft.json").symlink_to("a.json")
    (tree / "chain.json").symlink_to("soft.json")
    (tree / "absolute.json").symlink_to(tree / "a.json")
    os.link(tree / "a.json", tree / "hard.json")
    (tree / "sub").mkdir()
    (tree / "sub" / "b.json").write_bytes(b"below")
    (tree / "below.json").symlink_to("sub/b.json")
    for name in ("soft.json", "chain.json", "absolute.json", "hard.json"):
        assert content(tree, name) == b"inside"
    assert content(tree, "below.json") == b"below"
    (tree / "broken.json").symlink_to("nothing")
    assert code_of(files.open_inside, tree, "broken.json") == "E101"


def test_the_root_itself_may_be_a_link(tree: Path) -> None:
    (tree.parent / "alias").symlink_to("root")
    assert content(tree.parent / "alias", "a.json") == b"inside"


def test_not_regular_files(tree: Path) -> None:
    os.mkfifo(tree / "fifo")
    (tree / "folder").mkdir()
    assert code_of(files.open_inside, tree, "fifo") == "E104"
    assert code_of(files.open_inside, tree, "folder") == "E104"
    assert code_of(files.open_named, tree / "fifo") == "E104"
    assert code_of(files.open_named, tree) == "E104"
    assert code_of(files.open_named, Path("/dev/zero")) == "E104"
    assert code_of(files.sha256_of, tree / "fifo") == "E104"


def hub_cache(root: Path) -> Path:
    """An entry of the Hugging Face cache: blobs, and a snapshot of relative links to them."""
    entry = root / "models--Qwen--Tiny"
    (entry / "blobs").mkdir(parents=True)
    (entry / "blobs" / "3f2a").write_bytes(b"blob")
    snapshot = entry / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/3f2a")
    return snapshot


def test_a_hub_cache_snapshot_works(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    assert content(snapshot, "config.json") == b"blob"
    (tmp_path / "models--Other--Model" / "blobs").mkdir(parents=True)
    (tmp_path / "models--Other--Model" / "blobs" / "1").write_bytes(b"other")
    (snapshot / "other.json").symlink_to("../../../models--Other--Model/blobs/1")
    assert code_of(files.open_inside, snapshot, "other.json") == "E104"
    (snapshot.parent / "ffff").mkdir()
    (snapshot.parent / "ffff" / "x.json").write_bytes(b"another revision")
    (snapshot / "revision.json").symlink_to("../ffff/x.json")
    assert code_of(files.open_inside, snapshot, "revision.json") == "E104"


def test_blobs_outside_a_cache_do_not_count(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    plain = tmp_path / "plain"
    snapshot.parent.parent.rename(plain)
    assert code_of(files.open_inside, plain / "snapshots" / "0123abcd", "config.json") == "E104"


def test_blobs_that_are_a_link_do_not_count(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert code_of(files.open_inside, snapshot, "config.json") == "E104"


def test_limits(tree: Path) -> None:
    assert files.read_inside(tree, "a.json", 6) == b"inside"
    assert code_of(files.read_inside, tree, "a.json", 5) == "E102"
    assert code_of(files.read_named, tree / "a.json", 5) == "E101"
    assert files.read_named(tree / "a.json", 6) == b"inside"
    os.truncate(tree / "a.json", 1 << 40)  # sparse: refused by its size, not read
    assert code_of(files.read_json, tree, "a.json") == "E102"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tree: Path) -> None:
    (tree / "a.json").chmod(0)
    assert code_of(files.open_inside, tree, "a.json") == "E206"


def test_sha256(tree: Path) -> None:
    class Count:
        total = 0

        def advance(self, n: int) -> None:
            self.total += n

    data = os.urandom(3_000_001)
    (tree / "big").write_bytes(data)
    count = Count()
    assert files.sha256_of(tree / "big", count) == sha256(data).hexdigest()
    assert count.total == len(data)


def test_human_bytes() -> None:
    assert [files.human_bytes(n) for n in (0, 96, 1024, 3.3 * 2**30, 2**50)] == ["0 bytes", "96 bytes", "1.0 KiB", "3.3 GiB", "1024.0 TiB"]


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"nul",
        b"{} {}",
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":1,"a":2}',
        b'{"b":{"a":1,"\\u0061":2}}',
        b"NaN",
        b"[-Infinity]",
        b"1e999",
        b"[-1e999]",
        b"9223372036854775808",
        b"-9223372036854775808",
        b"9" * 5000,
        b'"\\ud800"',
        b'{"\\udfff":1}',
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b'"a\nb"',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"[" * (JSON_DEPTH + 1) + b"]" * (JSON_DEPTH + 1),
        b"[" + b"[]," * 4_000_000 + b"[]]",
        b"\x00",
        b"{}\x00",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_json_that_is_refused(text: bytes) -> None:
    assert code_of(parse_json, text, "here", "E121") == "E121"


def test_json_that_is_read() -> None:
    text = '{"a": [1, -2.5, true, null, "\\ud83d\\ude00 \u00e8"], "b": {"c": 9223372036854775807}}'
    assert parse_json(text.encode(), "here") == {"a": [1, -2.5, True, None, "\U0001f600 \u00e8"], "b": {"c": 2**63 - 1}}
    assert parse_json(b"[" * JSON_DEPTH + b"]" * JSON_DEPTH, "here")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
SCALARS = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | TEXT


@settings(max_examples=50, deadline=None)
@given(st.recursive(SCALARS, lambda x: st.lists(x, max_size=4) | st.dictionaries(TEXT, x, max_size=4), max_leaves=10))
def test_json_round_trip(value) -> None:
    assert parse_json(json.dumps(value).encode(), "here") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "here") == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}",:\\u0aed18-+.eE tfn', max_size=60).map(str.encode))
def test_json_raises_nothing_else(text: bytes) -> None:
    try:
        value = parse_json(text, "here")
    except ThoughtxError as error:
        assert error.render().isascii()
    else:
        assert value == json.loads(text)


# --- outputs ---------------------------------------------------------------------------------------------------------


def write_new(target: Path, *, force: bool = False, text: str = "new") -> None:
    with files.atomic_dir(target, force=force) as partial:
        (partial / "config.json").write_text(text)
        (partial / "manifest.json").write_text(text)
        (partial / "sub").mkdir()
        (partial / "sub" / "data").write_text(text)


def old_output(target: Path) -> Path:
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "manifest.json").write_text("old")
    return target


def state(target: Path) -> str:
    """absent | old | new; anything else is a mixture."""
    if not target.exists():
        return "absent"
    got = {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}
    known = {
        "old": {"config.json": "old", "manifest.json": "old"},
        "new": {"config.json": "new", "manifest.json": "new", "sub/data": "new"},
    }
    return next((name for name, files_ in known.items() if files_ == got), f"a mixture: {got}")


def hidden(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.name.startswith("."))


def test_atomic_dir(tmp_path: Path) -> None:
    write_new(tmp_path / "out")
    assert state(tmp_path / "out") == "new" and hidden(tmp_path) == []
    (tmp_path / "empty").mkdir()
    write_new(tmp_path / "empty")
    assert state(tmp_path / "empty") == "new"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_force_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    old_output(tmp_path / "out")
    write_new(tmp_path / "out", force=True)
    assert state(tmp_path / "out") == "new" and hidden(tmp_path) == []


def test_exchange_is_one_step_here(tmp_path: Path) -> None:
    old_output(tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert files.exchange(tmp_path / "a", tmp_path / "b")
    assert state(tmp_path / "b") == "old"


def test_exchange_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRename:
        pass

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: NoRename())
    assert not files.exchange(tmp_path, tmp_path)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path: Path, force: bool, exception: type[BaseException]) -> None:
    target = old_output(tmp_path / "out") if force else tmp_path / "out"
    with pytest.raises(exception), files.atomic_dir(target, force=force) as partial:
        (partial / "config.json").write_text("new")
        raise exception
    assert state(target) == ("old" if force else "absent") and hidden(tmp_path) == []


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "E203"), (errno.EDQUOT, "E203"), (errno.EIO, "E206"), (errno.EROFS, "E206")])
def test_a_disk_that_fails(tmp_path: Path, number: int, code: str) -> None:
    target = old_output(tmp_path / "out")
    with pytest.raises(ThoughtxError) as caught, files.atomic_dir(target, force=True) as partial:
        (partial / "half").write_text("new")
        raise OSError(number, os.strerror(number))
    assert (caught.value.code, caught.value.exit) == (code, Exit.ENVIRONMENT)
    assert state(target) == "old" and hidden(tmp_path) == []
    with pytest.raises(ThoughtxError) as caught, files.atomic_file(tmp_path / "file") as handle:
        handle.write(b"half")
        raise OSError(number, os.strerror(number))
    assert caught.value.code == code and not (tmp_path / "file").exists() and hidden(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_new(tmp_path / "out")
        with files.atomic_file(tmp_path / "file") as handle:
            handle.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_outputs_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_output(tmp_path / "full")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("full")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("somebody else's model")
    (tmp_path / "empty").mkdir()
    cases = [
        ("full", False),
        ("file", False),
        ("file", True),
        ("link", True),
        ("broken", True),
        ("foreign", True),
        ("none/out", False),
        ("file/out", False),
    ]
    for name, force in cases:
        assert code_of(files.check_output, tmp_path / name, force=force) == "E130", name
        with pytest.raises(ThoughtxError), files.atomic_dir(tmp_path / name, force=force):
            raise AssertionError("work was begun")
    monkeypatch.chdir(tmp_path / "full")
    for place in (Path("."), Path(".."), Path.cwd(), Path.cwd().parent):
        assert code_of(files.check_output, place, force=True) == "E130"
    for name, force in (("full-2", False), ("empty", False), ("empty", True)):
        files.check_output(tmp_path / name, force=force)
    monkeypatch.chdir(tmp_path)
    files.check_output(tmp_path / "full", force=True)
    assert hidden(tmp_path) == []


def test_outputs_that_overlap_inputs(tmp_path: Path) -> None:
    model = old_output(tmp_path / "model")
    (tmp_path / "alias").symlink_to("model")
    for target in (model, model / "out", tmp_path / "alias" / "out", tmp_path):
        assert code_of(files.check_output, target, force=True, inputs=[model]) == "E130"
        assert code_of(files.check_output, target, force=True, inputs=[tmp_path / "alias"]) == "E130"
        assert code_of(files.check_output, target, force=True, inputs=[tmp_path / "x", model / "config.json", model]) == "E130"
    assert code_of(files.check_output, model, force=True, inputs=[model / "config.json"]) == "E130"
    files.check_output(tmp_path / "model-2", force=False, inputs=[model])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert code_of(files.check_output, tmp_path / "out", force=False) == "E130"


def test_odd_names(tmp_path: Path) -> None:
    for name in ("with space", "new\nline", "-rf", "a*[b]?", "\u00fcml\u00e4ut", os.fsdecode(b"\xff\xfe")):
        write_new(tmp_path / name)
        write_new(tmp_path / name, force=True)
        assert state(tmp_path / name) == "new"
        assert code_of(files.check_output, tmp_path / name, force=False) == "E130"
    assert hidden(tmp_path) == []


def test_two_runs_to_one_output(tmp_path: Path) -> None:
    """The second of two that overlap is refused, or replaces the first as a whole; they never mix."""
    other = "import sys; from pathlib import Path; from trtllm_thoughtx.files import atomic_dir\n"
    other += "with atomic_dir(Path(sys.argv[1]), force=False) as p: (p / 'config.json').write_text('other')"
    with pytest.raises(ThoughtxError) as caught, files.atomic_dir(tmp_path / "out", force=False) as partial:
        (partial / "config.json").write_text("new")
        subprocess.run([sys.executable, "-c", other, str(tmp_path / "out")], check=True)
        assert partial.is_dir(), "another run removed what is in use"
    assert caught.value.code == "E130"
    assert (tmp_path / "out" / "config.json").read_text() == "other" and hidden(tmp_path) == []


def test_two_runs_in_one_process(tmp_path: Path) -> None:
    with files.atomic_dir(tmp_path / "out", force=False):
        assert code_of(write_new, tmp_path / "out") == "E130"


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_dead_runs_left_is_removed(tmp_path: Path) -> None:
    for kind in ("partial", "old"):
        left = tmp_path / f".out.{kind}-{dead_pid()}"
        left.mkdir()
        (left / "half").write_text("x")
    alive = tmp_path / f".out.partial-{os.getppid()}"
    alive.mkdir()
    other = tmp_path / f".out2.partial-{dead_pid()}"
    other.mkdir()
    mine = tmp_path / f".out.partial-{os.getpid()}"  # a pid that came round again
    mine.mkdir()
    (tmp_path / "out").mkdir()
    write_new(tmp_path / "out")
    assert state(tmp_path / "out") == "new"
    assert hidden(tmp_path) == sorted([alive.name, other.name])


def test_what_a_dead_run_moved_aside_comes_back(tmp_path: Path) -> None:
    """The fallback has one moment without a target; the next run ends it."""
    old_output(tmp_path / f".out.old-{dead_pid()}")
    with pytest.raises(ThoughtxError, match="E130"), files.atomic_dir(tmp_path / "out", force=False):
        raise AssertionError("the old output is back, so this must be refused")
    assert state(tmp_path / "out") == "old" and hidden(tmp_path) == []


KILLED = """
import os, sys, time
from pathlib import Path
from trtllm_thoughtx import files

target, moment, can_exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"
if not can_exchange:
    files.exchange = lambda one, other: False
os.fsync = lambda handle: None  # durability is not the subject, and a busy disk would take its time

def stop(now):
    if now == moment:
        print("here", flush=True)
        time.sleep(3600)

def around(module, name):
    inner = getattr(module, name)
    count = [0]
    def outer(*args, **kwargs):
        count[0] += 1
        stop(f"before {name} {count[0]}")
        result = inner(*args, **kwargs)
        stop(f"after {name} {count[0]}")
        return result
    setattr(module, name, outer)

for name in ("rename", "mkdir"):
    around(os, name)
for name in ("exchange", "_sync_tree"):
    around(files, name)
with files.atomic_dir(target, force=True) as partial:
    stop("at the start")
    (partial / "config.json").write_text("new")
    stop("in the middle")
    (partial / "manifest.json").write_text("new")
    (partial / "sub").mkdir()
    (partial / "sub" / "data").write_text("new")
stop("at the end")
"""
KILLS = [
    ("before mkdir 1", True, "old", {"old"}),
    ("after mkdir 1", True, "old", {"old"}),
    ("at the start", True, "old", {"old"}),
    ("in the middle", True, "old", {"old"}),
    ("after _sync_tree 1", True, "old", {"old"}),
    ("before exchange 1", True, "old", {"old"}),
    ("after exchange 1", True, "old", {"new"}),
    ("at the end", True, "old", {"new"}),
    ("in the middle", True, "absent", {"absent"}),
    ("before rename 1", True, "absent", {"absent"}),
    ("after rename 1", True, "absent", {"new"}),
    ("before rename 1", False, "old", {"old"}),
    ("after rename 1", False, "old", {"absent"}),  # the fallback's one moment; the next run puts the old one back
    ("after rename 2", False, "old", {"new"}),
]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(
    ("moment", "can_exchange", "before", "allowed"), KILLS, ids=[f"{k[0]}-{k[2]}" + "-fallback" * (not k[1]) for k in KILLS]
)
def test_killed_at_any_moment(tmp_path: Path, moment: str, can_exchange: bool, before: str, allowed: set[str], kill: int) -> None:
    target = old_output(tmp_path / "out") if before == "old" else tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(target), moment, str(int(can_exchange))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "here\n", "the moment never came"
        child.send_signal(kill)
        child.wait()
    if kill == signal.SIGINT and (moment, can_exchange) == ("after rename 1", False):
        allowed = {"old"}
    assert state(target) in allowed
    if kill == signal.SIGINT and moment not in ("after mkdir 1",):
        assert hidden(tmp_path) == [], "an interrupt cleans up"
    write_new(target, force=True)
    assert state(target) == "new" and hidden(tmp_path) == [], "the next run repairs and cleans up"


def test_killed_at_random(tmp_path: Path) -> None:
    """The names that a reader sees, polled while a writer replaces the directory and is killed again and again."""
    target = old_output(tmp_path / "out")
    loop = "import sys; from pathlib import Path; from trtllm_thoughtx.files import atomic_dir\nprint('on', flush=True)\nwhile True:\n"
    loop += "  with atomic_dir(Path(sys.argv[1]), force=True) as p:\n    for i in range(20): (p / f'{i}.json').write_text('x' * i)\n"
    loop += "    (p / 'manifest.json').write_text('new')\n"
    for k in range(5):
        with subprocess.Popen([sys.executable, "-c", loop, str(target)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "on\n"
            for _ in range(30 + 7 * k):
                os.stat(target)  # fails if the name is ever absent
                time.sleep(0.001)
            child.kill()
        names = sorted(p.name for p in target.iterdir())
        assert names == ["config.json", "manifest.json"] or len(names) == 21, names
    write_new(target, force=True)
    assert state(target) == "new" and hidden(tmp_path) == []


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    yield


def test_require_space(tmp_path: Path, small_disk: None) -> None:
    files.require_space(tmp_path / "not" / "yet" / "there", 1 << 30)
    with pytest.raises(ThoughtxError) as caught:
        files.require_space(tmp_path / "not" / "yet" / "there", 3 << 30)
    assert caught.value.code == "E203" and "3.0 GiB" in caught.value.what and "1.0 GiB" in caught.value.what


def test_atomic_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with files.atomic_file(path) as handle:
        handle.write(b"one")
        assert not path.exists()
    with files.atomic_file(path) as handle:
        handle.write(b"two")
        assert path.read_bytes() == b"one"
    with pytest.raises(KeyboardInterrupt), files.atomic_file(path) as handle:
        handle.write(b"three")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"two" and hidden(tmp_path) == []
    (tmp_path / f".report.json.partial-{dead_pid()}").write_bytes(b"left")
    with files.atomic_file(path) as handle:
        handle.write(b"four")
    assert path.read_bytes() == b"four" and hidden(tmp_path) == []
    (tmp_path / "link").symlink_to("report.json")
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder"):
        with pytest.raises(ThoughtxError, match="E130"), files.atomic_file(tmp_path / name):
            raise AssertionError("work was begun")
    with pytest.raises(ThoughtxError, match="E206"), files.atomic_file(tmp_path / "none" / "file"):
        raise AssertionError("work was begun")
