"""Stop ids and settings of generation, from generation_config.json or config.json, as transformers has them, through every directory."""

from __future__ import annotations

import json

import pytest
from chat_models import write_chat_model
from click.testing import CliRunner
from tiny import write_tiny

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.quantize.job import calibrate
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.generation_config import IDS, read_generation_config
from trtllm_thoughtx.cli.commands import thoughtx
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text

CASES = [
    ({"eos_token_id": 5}, None),
    ({"eos_token_id": [3, 5], "bos_token_id": 1, "pad_token_id": 2}, None),
    ({"eos_token_id": None, "bos_token_id": 7}, None),
    ({"eos_token_id": 5, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": None, "repetition_penalty": 1.2}, None),
    ({"eos_token_id": 5, "max_new_tokens": 9}, None),
    ({"eos_token_id": 5, "temperature": 0.5}, {}),
    ({"eos_token_id": 5}, {"eos_token_id": None}),
    ({"eos_token_id": 5}, {"eos_token_id": [7, 8], "top_k": 2, "do_sample": True}),
]
OPTIONS = {"backend": ("onnxruntime",), "max_seq_len": 64}


@pytest.mark.parametrize(("config", "generation"), CASES)
def test_the_settings_are_transformers(config, generation, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    hf = tmp_path / "hf"
    write_tiny(hf, config=config)
    if generation is not None:
        (hf / "generation_config.json").write_text(json.dumps(generation))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf).generation_config
    convert(hf, tmp_path / "checkpoint")
    build(tmp_path / "checkpoint", tmp_path / "engine", OPTIONS)
    for root in (hf, tmp_path / "checkpoint", tmp_path / "engine"):
        ours = read_generation_config(root)
        for key in {*IDS, *config, *(generation or {})}:
            assert ours.get(key) == getattr(theirs, key), (root.name, key)
    build(hf, tmp_path / "direct", OPTIONS)
    assert read_generation_config(tmp_path / "direct") == read_generation_config(tmp_path / "engine")


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("as_list", [True, False])
def test_answers_stop_where_config_json_says(tokenizer, as_list, tmp_path):
    """Through a checkpoint, a quantized one and an engine, with a tokenizer and without; the command line says eos."""
    root = write_chat_model(tmp_path / "hf", "instruct") if tokenizer else tmp_path / "hf"
    if not tokenizer:
        write_tiny(root)
    build(root, tmp_path / "free", OPTIONS)
    engine = Engine.load(tmp_path / "free", num_threads=1)
    prompt, size = [8, 9, 10, 11], engine.config.vocab_size
    free = engine.generate([prompt], GenerationParams(max_new_tokens=20, ignore_eos=True))[0].output_ids
    engine.close()
    stop = next(token for place, token in enumerate(free) if place >= 2 and token not in free[:place])
    raw = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(raw | {"eos_token_id": [size - 1, stop] if as_list else stop}))
    convert(root, tmp_path / "checkpoint")
    for checkpoint, out in ((root, "direct"), (tmp_path / "checkpoint", "engine")):
        build(checkpoint, tmp_path / out, OPTIONS)
        words = ["run", "--engine_dir", str(tmp_path / out), "--input_ids", "8,9,10,11", "--max_new_tokens", "20", "--json"]
        row = json.loads(CliRunner().invoke(thoughtx, words).stdout)["results"][0]
        assert (row["output_ids"], row["stop_reason"]) == (free[: free.index(stop) + 1], "eos")
    if tokenizer:
        assert stop in Text.load(root).eos_ids and stop in Text.load(tmp_path / "checkpoint").eos_ids


def test_a_quantized_checkpoint_keeps_them(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    write_tiny(tmp_path / "hf", config={"eos_token_id": [3, 5]})
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [8, 9, 10, 11, 12, 13, 14, 15]}\n' * 2)
    calibrate(tmp_path / "hf", tmp_path / "out", qformat="int8_wo", calib_data=data, calib_size=2)
    assert read_generation_config(tmp_path / "out")["eos_token_id"] == [3, 5]
