"""One table for the options of a build: the flags, their checks, and the settings of the engine follow it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
import pytest
from tiny import write_tiny

from trtllm_thoughtx import config, report
from trtllm_thoughtx.build import build as building
from trtllm_thoughtx.build import engine_dir, options
from trtllm_thoughtx.build.flags import Count
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli import framework
from trtllm_thoughtx.errors import ThoughtxError

# Fields that no option sets alone: they follow from --chunk_size auto, and from the checkpoint's exits.
FOLLOW = {"adaptive_chunks", "exit_head", "exit_threshold", "draft_layers", "draft_ranks", "draft_thresholds"}


def test_every_option_is_a_flag_and_every_setting_has_its_option() -> None:
    flags = {param.name: param for param in cli.build.params if isinstance(param, click.Option)}
    assert {name: flags[name].help for name in options.OPTIONS} == {name: row.help for name, row in options.OPTIONS.items()}
    assert set(options.FIELDS) | FOLLOW == {field.name for field in dataclasses.fields(config.BuildConfig)}


def test_a_row_and_a_field_make_a_new_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is parsed, checked, recorded in settings and manifest, and read back strictly; no other file knows of it."""
    extended = dataclasses.make_dataclass(
        "BuildConfig", [("warp_speed", int, config.since(engine_dir.SCHEMA, 7))], bases=(config.BuildConfig,), frozen=True, kw_only=True
    )
    row = options.Option("warp_speed", Count(1, 9), "How fast.")
    for module in (options, engine_dir):
        monkeypatch.setattr(module, "BuildConfig", extended)
    monkeypatch.setattr(options, "BLANK", extended())
    monkeypatch.setitem(options.OPTIONS, "warp_speed", row)
    monkeypatch.setitem(options.FIELDS, "warp_speed", row)

    @click.command()
    @framework.build_options
    def command(**given: object) -> None:
        seen.update({name: value for name, value in given.items() if value})

    seen: dict[str, object] = {}
    command.main(["--warp_speed", "3", "--backend", "onnxruntime"], standalone_mode=False)
    assert seen["warp_speed"] == 3
    write_tiny(tmp_path / "m", num_layers=1)
    building.build(tmp_path / "m", tmp_path / "e", {"backend": ("onnxruntime",), "max_seq_len": 64, "warp_speed": 3})
    assert engine_dir.EngineDir.open(tmp_path / "e").build.warp_speed == 3  # type: ignore[attr-defined]
    assert "--warp_speed 3" in report.read_manifest(tmp_path / "e")["command"]
    with pytest.raises(ThoughtxError) as caught:
        building.build(tmp_path / "m", tmp_path / "f", {"backend": ("onnxruntime",), "warp_speed": 10})
    assert caught.value.code == "E001" and "from 1 to 9" in caught.value.why
    body = json.loads((tmp_path / "e" / "config.json").read_text())
    body["thoughtx"]["build"]["warp_speed"] = 10
    (tmp_path / "e" / "config.json").write_text(json.dumps(body))
    with pytest.raises(ThoughtxError) as caught:
        engine_dir.EngineDir.open(tmp_path / "e")
    assert caught.value.code == "E121" and "warp_speed" in caught.value.why


@pytest.mark.parametrize(
    "change",
    [
        {"backends": ["vulkan"]},
        {"dtype": "int8"},
        {"max_seq_len": 0},
        {"sink_tokens": -1},
        {"base_size": -1.0},
        {"use_chunked_attention": True},
        {"chunk_size": 16, "max_chunk_size": 16},
        {"optimization_level": 6},
        {"stages": [-1]},
        {"compute_capabilities": ["latest"]},
    ],
    ids=str,
)
def test_settings_that_no_option_gives_are_malformed(tmp_path: Path, change: dict[str, object]) -> None:
    write_tiny(tmp_path / "m", num_layers=1)
    building.build(tmp_path / "m", tmp_path / "e", {"backend": ("onnxruntime",), "max_seq_len": 64})
    body = json.loads((tmp_path / "e" / "config.json").read_text())
    body["thoughtx"]["build"] |= change
    (tmp_path / "e" / "config.json").write_text(json.dumps(body))
    with pytest.raises(ThoughtxError) as caught:
        engine_dir.EngineDir.open(tmp_path / "e")
    assert caught.value.code == "E121"
