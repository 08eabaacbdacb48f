"""What a release document may hold, and what is said of what it may not."""

from __future__ import annotations

import pytest
from places import ROOT, TINY

from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.cli.release import flags_of_documents
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.release.document import read_release

GOOD = f"""name: r
date: 2026-11-30
models:
  m: {{path: {TINY}}}
formats:
  plain: {{}}
  int8: {{qformat: int8_sq, calib_size: 8}}
targets:
  cpu: {{backend: onnxruntime, max_seq_len: 64}}
limits: {{max_bytes: 1.5 GiB, max_kl: 0.1}}
"""
BAD = [
    ("name: r", "name: r\nname: s", 2, "set twice"),
    ("name: r", "name: ''", 1, "must be a name"),
    ("name: r", "name: r\nmodel: x", 2, "perhaps models is meant"),
    ("date: 2026-11-30", "date: soon", 2, "must be a date"),
    ("date: 2026-11-30\n", "date: &d 2026-11-30\n", None, "anchors"),
    ("date: 2026-11-30", "date: !!python/object:os.system x", 2, "no plain value"),
    ("  m: {path", "  m/n: {path", 4, "cannot be a name"),
    ("  m: {path", "  m: {paths", 4, "perhaps path is meant"),
    ("calib_size: 8", "calib_size: 0", 7, "impossible value"),
    ("calib_size: 8", "calib_size: [8, true]", 7, "impossible value"),
    ("qformat: int8_sq, ", "", 6, "no qformat"),
    ("qformat: int8_sq", "qformats: int8_sq", 7, "perhaps qformat is meant"),
    ("qformat: int8_sq", "output_dir: x", 7, "unknown key output_dir"),
    ("max_seq_len: 64", "use_chunked_attention: 1", 9, "must be true or false"),
    ("max_seq_len: 64", "gpu: 4090", 9, "must be a text"),
    ("1.5 GiB", "1.5 GB", 10, "must be a size"),
    ("max_kl: 0.1", "max_kl: -1", 10, "must be a number from 0"),
    ("limits:", "leave_out: [{targets: gpu}]\nlimits:", 10, "leave_out names gpu"),
    ("limits:", "cores: {build: 0}\nlimits:", 10, "must be a whole number"),
    ("limits:", "attention: {a: {max_seq_len: 32}}\nlimits:", 10, "sets a flag twice"),
    ("limits:", "exits: {a: {seed: 1}}\nlimits:", 10, "fits nothing"),
    ("formats:\n", "formats: []\nothers:\n", 5, "must be a list of"),
    (GOOD, "", None, "empty"),
    (GOOD, "- a\n", 1, "must be a list of"),
    (GOOD, "a: [\n", 2, "not a plain YAML file"),
    (GOOD, "[" * 5000, None, "too many lists"),
    (GOOD, "name: r\n", 1, "lacks models, formats, targets"),
]


def read(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    return read_release(tmp_path / "r.yaml", flags_of_documents())


def test_what_is_read(tmp_path):
    release = read(tmp_path, GOOD)
    assert release.models["m"].path == TINY and release.date == 1796_000_000 - 1796_000_000 % 86400
    assert release.formats["plain"].flags == () and release.formats["int8"].value("qformat") == "int8_sq"
    assert release.limits.max_bytes == 3 << 29 and release.sign is None and list(release.attention) == ["none"]


@pytest.mark.parametrize(("old", "new", "line", "says"), BAD, ids=[row[3].replace(" ", "-") + f"-{n}" for n, row in enumerate(BAD)])
def test_what_is_refused(old, new, line, says, tmp_path):
    assert old in GOOD
    with pytest.raises(ThoughtxError) as refused:
        read(tmp_path, GOOD.replace(old, new, 1))
    error = refused.value
    assert error.code == "E002" and says in f"{error.what} {error.why} {error.fix}", error.render()
    assert error.where.endswith(f"r.yaml line {line}" if line else "r.yaml")


def test_a_refused_document_leaves_nothing(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(GOOD.replace("max_seq_len: 64", "max_seq_len: 999999"))
    words = [str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path / "out")]
    assert run(cli.COMMANDS["release"], "thoughtx-release", words) == 2
    assert "r-" not in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("path", sorted((ROOT / "build_configs" / "releases").glob("*.yaml")), ids=lambda path: path.name)
def test_every_release_parses(path):
    release = read_release(path, flags_of_documents())
    assert release.models and release.targets and release.formats
