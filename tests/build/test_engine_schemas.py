"""Engine directories of every schema that was released are read and run; newer ones are refused by name.

tests/build/engines/schema{N}.zip holds a directory as thoughtx-build wrote it then (chunked attention, two stages, an exit head and a
draft), and expected.json: prompts, and the tokens that it generated then.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
from tiny import write_tiny

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.build.engine_dir import SCHEMA, EngineDir
from trtllm_thoughtx.config import BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.text.params import GenerationParams

STORED = sorted((Path(__file__).parent / "engines").glob("schema*.zip"))
RELEASED = range(SCHEMA)  # the present one is that of the tree


@pytest.fixture(params=STORED, ids=lambda path: path.stem)
def stored(request, tmp_path):
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(tmp_path / "engine")
    expected = json.loads((tmp_path / "engine" / "expected.json").read_text())
    (tmp_path / "engine" / "expected.json").unlink()
    return tmp_path / "engine", expected


def change(root: Path, **changes: object) -> None:
    body = json.loads((root / "config.json").read_text())
    version = changes.pop("version", body["version"])
    body |= {"version": version, "thoughtx": {**body["thoughtx"], **changes}}
    (root / "config.json").write_text(json.dumps(body))


def refusal(root: Path) -> ThoughtxError:
    with pytest.raises(ThoughtxError) as raised:
        EngineDir.open(root)
    assert raised.value.code == "E121"
    return raised.value


def test_every_released_schema_has_its_directory():
    assert [path.stem for path in STORED] == [f"schema{n}" for n in RELEASED]


def test_an_engine_of_an_older_schema_generates_what_it_did(stored):
    root, expected = stored
    with contextlib.closing(Engine.load(root)) as engine:
        done = engine.generate(expected["prompts"], GenerationParams(max_new_tokens=6, temperature=0.0), chunk_size=8)
    assert [one.output_ids for one in done] == expected["tokens"]


def test_settings_that_an_older_schema_lacks_have_the_values_they_had(stored):
    root, _ = stored
    body = json.loads((root / "config.json").read_text())["thoughtx"]
    have, now = EngineDir.open(root).build.as_dict(), BuildConfig().as_dict()
    for field in fields(BuildConfig):
        is_later = field.metadata.get("schema", 0) > body.get("schema", 0)
        assert have[field.name] == (now if is_later else body["build"])[field.name], field.name


def made(root: Path) -> Path:
    write_tiny(root / "m", num_layers=1)
    build(root / "m", root / "e", {"backend": ("onnxruntime",), "max_seq_len": 64})
    return root / "e"


def test_a_new_engine_says_its_schema(tmp_path):
    root = made(tmp_path)
    body = json.loads((root / "config.json").read_text())["thoughtx"]
    assert body["schema"] == SCHEMA
    assert set(body["build"]) == {field.name for field in fields(BuildConfig)}
    assert all(0 <= field.metadata.get("schema", 0) <= SCHEMA for field in fields(BuildConfig))


def test_a_newer_schema_is_refused_with_the_version_to_install(tmp_path):
    root = made(tmp_path)
    build_section = json.loads((root / "config.json").read_text())["thoughtx"]["build"]
    change(root, schema=SCHEMA + 1, version="9.8.7", build={**build_section, "warp_speed": 3})
    error = refusal(root)
    assert "9.8.7" in error.fix and f"schema {SCHEMA + 1}" in error.why and "install" in error.fix


@pytest.mark.parametrize("value", [True, -1, "1", 1.0, None, [1]])
def test_a_schema_that_is_no_number_is_malformed(tmp_path, value):
    root = made(tmp_path)
    change(root, schema=value)
    assert "schema" in refusal(root).why


def test_missing_and_unknown_settings_of_a_known_schema_are_named(tmp_path):
    root = made(tmp_path)
    settings = json.loads((root / "config.json").read_text())["thoughtx"]["build"]
    settings["warp_speed"] = settings.pop("max_seq_len")
    change(root, build=settings)
    error = refusal(root)
    assert "max_seq_len is missing" in error.why and "warp_speed" in error.why


def test_a_setting_of_a_later_schema_takes_its_default(monkeypatch, tmp_path):
    """As if one more setting had come with the next schema: the present form stays readable."""
    import dataclasses

    from trtllm_thoughtx import config
    from trtllm_thoughtx.build import engine_dir

    extended = dataclasses.make_dataclass(
        "BuildConfig", [("warp_speed", int, config.since(SCHEMA + 1, 7))], bases=(BuildConfig,), frozen=True, kw_only=True
    )
    root = made(tmp_path)
    monkeypatch.setattr(engine_dir, "BuildConfig", extended)
    monkeypatch.setattr(engine_dir, "SCHEMA", SCHEMA + 1)
    assert EngineDir.open(root).build.warp_speed == 7
