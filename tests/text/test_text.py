"""Text: ids as transformers gives them, streams that never cut a character, and hostile tokenizer files that only ever cost an error."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TINY as SAMPLE
from tokenizer_kinds import CONFIG, TOKENIZERS, byte_level

from trtllm_thoughtx.checkpoint.generation_config import read_generation_config
from trtllm_thoughtx.errors import Exit, ThoughtxError
from trtllm_thoughtx.text.chat import ChatTemplate
from trtllm_thoughtx.text.prompts import Prompt, prompt_rows
from trtllm_thoughtx.text.text import Text, prompt_ids

QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe helpful, it is ' ~ strftime_now('%Y') ~ '.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and not loop.last %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1] + '<|im_end|>' + '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}"
    "{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' and m['content'] is not none %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {% endif %}
    {% if loop.index0 > 50 %}{% break %}{% endif %}
    {% generation %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
    {{- content }}
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{% endif %}
"""
CHATS: list[Any] = [
    "What is 2 + 3?",
    [
        {"role": "user", "content": "Hi 🙂\n"},
        {"role": "assistant", "content": "<think>hm</think>Hello"},
        {"role": "user", "content": "über <s>"},
    ],
    [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "reasoning": "c"}],
]


def write(root: Path, tokenizer: str = "byte_level", config: dict[str, Any] | None = CONFIG, **files: Any) -> Path:
    """A directory with tokenizer.json and more; `files` maps names (dots as __) to text, or data for JSON."""
    root.mkdir(exist_ok=True)
    TOKENIZERS[tokenizer]().save(str(root / "tokenizer.json"))
    if config is not None:
        (root / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (root / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def loaded(root: Path) -> Text:
    text = Text.load(root)
    assert text is not None
    return text


def theirs(root: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(root)


def refused(call: Any, code: str) -> ThoughtxError:
    with pytest.raises(ThoughtxError) as caught:
        call()
    assert caught.value.code == code, caught.value.render()
    assert caught.value.exit is Exit.REFUSED and all(caught.value.as_dict().values())
    return caught.value


# --- against transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", CHATS, ids=["text", "dialogue", "nulls"])
@pytest.mark.parametrize("template", [QWEN25, DEEPSEEK, LLAMA3], ids=["qwen2.5", "deepseek", "llama3"])
def test_chats_get_the_ids_of_transformers(tmp_path: Path, template: str, chat: Any) -> None:
    root = write(tmp_path, chat_template__jinja=template)
    messages = [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
    text, reference = loaded(root), theirs(root)
    for ours, switches in (
        (text.chat(chat), {"add_generation_prompt": True}),
        (text.chat(chat, add_generation_prompt=False), {"add_generation_prompt": False}),
        (text.chat(chat, enable_thinking=False), {"add_generation_prompt": True, "enable_thinking": False}),
        (text.chat(chat, enable_thinking=True), {"add_generation_prompt": True, "enable_thinking": True}),
        (text.chat(chat, tools=[{"name": "f", "x": "<é>"}]), {"add_generation_prompt": True, "tools": [{"name": "f", "x": "<é>"}]}),
    ):
        assert ours == reference.apply_chat_template(messages, return_dict=False, **switches)
        assert len(ours) > 5


def test_switches_reach_the_template(tmp_path: Path) -> None:
    text = loaded(write(tmp_path, chat_template__jinja=QWEN25))
    assert text.decode(text.chat("a", enable_thinking=False), skip_special=False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert text.chat("a", enable_thinking=True) == text.chat("a")


@pytest.mark.parametrize("name", ["thoughtx-tiny", "longcot-tiny"])
def test_the_shipped_samples_chat_as_in_transformers(name: str) -> None:
    root = SAMPLE.parent / name
    text, reference = loaded(root), theirs(root)
    for prompt in ("x1 = 38 x2 = 75 ?", "zzz"):
        wanted = reference.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False)
        assert text.chat(prompt) == wanted
    assert text.eos_ids == (1,) and text.pad_id == 0 and text.bos_id is None and text.think_ids == ((2,), (3,))
    assert text.decode([4, 7, 1, 17]) == reference.decode([4, 7, 1, 17], skip_special_tokens=True) == "Q ok 0"
    text.check_vocab(json.loads((root / "config.json").read_text())["vocab_size"])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("sample", ["", " hello  hello.", "Füße 🙂 <s>x</s>", "a\x00b\r\n\u200b", "abc. d"])
def test_encode_and_decode_are_those_of_transformers(tmp_path: Path, name: str, sample: str) -> None:
    root = write(tmp_path, name, {key: value for key, value in CONFIG.items() if not key.endswith("_token")})
    text, reference = loaded(root), theirs(root)
    ids = text.encode(sample)
    assert ids == reference(sample)["input_ids"]
    assert text.encode(sample, add_special=False) == reference(sample, add_special_tokens=False)["input_ids"]
    for skip in (True, False):
        assert text.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def test_a_token_named_special_becomes_special(tmp_path: Path) -> None:
    """`he` is an ordinary piece of the vocabulary until the config calls it the EOS."""
    root = write(tmp_path, "byte_fallback", {**CONFIG, "eos_token": "he", "extra_special_tokens": ["lo", "nowhere"]})
    text, reference = loaded(root), theirs(root)
    ids = text.encode("abhelo")
    assert ids == reference("abhelo")["input_ids"]
    assert text.decode(ids) == "ab" and text.eos_ids == (reference.eos_token_id,)


def test_tokens_that_only_the_config_lists_are_added(tmp_path: Path) -> None:
    entry = {"content": "<extra>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    size = byte_level().get_vocab_size()
    root = write(tmp_path, config={**CONFIG, "added_tokens_decoder": {str(size): entry}})
    text = loaded(root)
    assert text.encode("a<extra>") == theirs(root)("a<extra>")["input_ids"] and text.encode("<extra>") == [size]
    write(tmp_path, config={**CONFIG, "added_tokens_decoder": {"5": entry}})
    assert "<extra>" in refused(lambda: Text.load(root), "E112").what


def test_special_tokens_map_counts_as_in_transformers(tmp_path: Path) -> None:
    root = write(tmp_path, special_tokens_map__json={"eos_token": {"content": "</s>"}, "unk_token": "<s>"})
    assert loaded(root).special == theirs(root).special_tokens_map
    assert loaded(root).special["eos_token"] == "</s>"
    flags = ("content", "special", "lstrip", "rstrip", "single_word", "normalized")
    tokens = byte_level().get_added_tokens_decoder()
    added = {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in tokens.items()}
    root = write(tmp_path, config={**CONFIG, "added_tokens_decoder": added})
    assert loaded(root).special["eos_token"] == theirs(root).special_tokens_map["eos_token"] == "<|im_end|>"


def test_the_template_file_wins_and_lists_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    root = write(tmp_path, config={**CONFIG, "chat_template": named})
    assert loaded(root).render("x") == "D" and loaded(root).render("x", tools=[{"name": "f"}]) == "T"
    (root / "chat_template.jinja").write_bytes(b"J\r\n{% if true %}\r\nK{% endif %}")
    assert loaded(root).render("x") == "J\nK"
    assert loaded(root).chat("x") == theirs(root).apply_chat_template([{"role": "user", "content": "x"}], return_dict=False)
    (root / "chat_template.jinja").unlink()
    write(root, config={**CONFIG, "chat_template": named[1:]})
    assert "tool_use" in refused(lambda: loaded(root).chat("x"), "E112").what


# --- special ids -------------------------------------------------------------------------------------------------------


def test_special_ids_join_both_files(tmp_path: Path) -> None:
    tokenizer = byte_level()
    stated = {"eos_token_id": [7, 3], "bos_token_id": 9, "pad_token_id": 8, "temperature": 0.6, "do_sample": True}
    root = write(tmp_path, generation_config__json=stated)
    text = loaded(root)
    assert text.eos_ids == (3, 7, tokenizer.token_to_id("<|im_end|>"))
    assert (text.bos_id, text.pad_id) == (tokenizer.token_to_id("<s>"), tokenizer.token_to_id("<|endoftext|>"))
    params = text.default_params(top_k=None, seed=5)
    assert (params.temperature, params.top_k, params.seed, params.stop_ids) == (0.6, 50, 5, text.eos_ids)
    text = loaded(write(tmp_path, config={}))
    assert text.eos_ids == (3, 7) and (text.bos_id, text.pad_id) == (9, 8)
    assert read_generation_config(root)["pad_token_id"] == 8 and read_generation_config(root / "no") == {}


def test_add_bos_token_adds_a_missing_bos_and_no_second_one(tmp_path: Path) -> None:
    text = loaded(write(tmp_path, config={**CONFIG, "add_bos_token": True}))
    assert text.encode("a") == [text.bos_id, *text.encode("a", add_special=False)]
    assert text.encode("<s>a") == [text.bos_id, *text.encode("a", add_special=False)]
    text = loaded(write(tmp_path, "byte_fallback", {**CONFIG, "add_bos_token": True}))
    assert text.encode("a").count(1) == 1


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    root = write(tmp_path)
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(root / "tokenizer.json"))
    assert len(loaded(root).encode("quick brown fox " * 4)) > 3 and len(loaded(root).encode("a")) == 1


@pytest.mark.parametrize(
    ("template", "wanted"),
    [(DEEPSEEK, ["<think>", "</think>"]), (LLAMA3, ["<think>", "</think>"])],
)
def test_thinking_tags_as_single_tokens(tmp_path: Path, template: str, wanted: list[str]) -> None:
    text = loaded(write(tmp_path, chat_template__jinja=template))
    assert text.think_ids == tuple((byte_level().token_to_id(tag),) for tag in wanted)


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        ("{{ '<think>' }}", ("<think>", "</think>")),
        ("{{ x.split('</think>') }}", ("<think>", "</think>")),
        ("<|begin_of_thought|>", ("<|begin_of_thought|>", "<|end_of_thought|>")),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_thinking_tags_of_several_tokens(tmp_path: Path, template: str | None, tags: tuple[str, str] | None) -> None:
    text = loaded(write(tmp_path, "byte_fallback", {**CONFIG, "chat_template": template}))
    if tags is None:
        assert text.think_ids is None
    else:
        assert text.think_ids == tuple(tuple(text.encode(tag, add_special=False)) for tag in tags)
        assert min(map(len, text.think_ids)) > 3


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    text = loaded(write(tmp_path))
    size = byte_level().get_vocab_size()
    text.check_vocab(size)
    text.check_vocab(size + 100)
    assert str(size - 1) in refused(lambda: text.check_vocab(size - 1), "E112").what
    text = loaded(write(tmp_path, generation_config__json={"eos_token_id": 9999}))
    assert "9999" in refused(lambda: text.check_vocab(size), "E112").what


# --- streams -----------------------------------------------------------------------------------------------------------

STREAMED: dict[str, Text] = {}


def streamed(name: str) -> Text:
    if name not in STREAMED:
        STREAMED[name] = loaded(SAMPLE) if name == "sample" else Text(TOKENIZERS[name](), name)
    return STREAMED[name]


def pieces(text: Text, ids: list[int], skip: bool) -> list[str]:
    stream = text.stream(skip)
    return [*(stream.push(i) for i in ids), stream.end()]


@pytest.mark.parametrize("name", ["sample", *TOKENIZERS])
@pytest.mark.parametrize("skip", [True, False])
def test_a_stream_joins_to_the_whole(name: str, skip: bool) -> None:
    text = streamed(name)
    size = text._tokenizer.get_vocab_size()

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.one_of(st.lists(st.integers(0, size + 3), max_size=90), st.lists(st.sampled_from(range(0, size, 7)), max_size=90)))
    def check(ids: list[int]) -> None:
        assert "".join(pieces(text, ids, skip)) == text.decode(ids, skip)

    check()
    gap = [3, *[size + 1] * 40, 4, *[0] * 40, 5]  # ids without a token, and maybe special ones
    assert "".join(pieces(text, gap, skip)) == text.decode(gap, skip)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_stream_never_shows_half_a_character(name: str) -> None:
    text = streamed(name)
    sample = "hello 🙂🙃 über 数学 \ufffd é." * 6
    ids = text.encode(sample, add_special=False)
    shown = ""
    for piece in pieces(text, ids, True):
        shown += piece
        assert sample.startswith(shown)
    assert shown == sample
    cut = [*text.encode("a", add_special=False), *text.encode("🙂", add_special=False)[:-1]]
    assert "\ufffd" not in "".join(pieces(text, cut, True)[:-1]) and pieces(text, cut, True)[-1].strip("\ufffd") == ""


def test_a_stream_shows_text_early_and_costs_no_more_when_long() -> None:
    text = streamed("byte_level")
    ids = text.encode("the quick brown fox " * 60)
    stream = text.stream()
    num_behind = max(len(text.decode(ids[: i + 1])) - n for i, n in enumerate(_running(stream.push(t) for t in ids)))
    assert num_behind == 0 and len(stream._ids) < 30


def _running(parts: Any) -> Any:
    total = 0
    for part in parts:
        total += len(part)
        yield total


# --- hostile templates -------------------------------------------------------------------------------------------------

HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion that forks": "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "one long operation": "{{ (7 ** 9999999) % 10 }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long text": "{{ 'a' * 2000000000 }}",
    "wide format": "{{ '%*d' % (2000000000, 1) }}",
    "constant folding": "{{ 'a' | center(2000000000) }}",
    "doubling": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "shared list": "{% set ns = namespace(x=[1]) %}{% for i in range(70) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "large output": "{% for i in range(99999) %}{{ 'aaaaaaaaaa' * 100 }}{% endfor %}",
    "large range": "{% for i in range(1000000000) %}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "imports": "{{ raise_exception.__globals__['sys'].modules }}",
    "format attributes": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "map attribute": "{{ (['']|map('attr', '__class__')|first).mro() }}",
    "change of input": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "syntax": "{% for x in %}",
    "undefined": "{{ a.b.c }}",
    "type error": "{{ 1 + 'a' }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "control characters": "{{ 1 + 'a' }}\x1b[2J{{ x['\x1b[2J\u202e'].y }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_an_error(name: str) -> None:
    template = ChatTemplate(HOSTILE[name], "chat_template.jinja")
    error = refused(lambda: template.render(messages=[{"role": "user", "content": "x"}]), "E112")
    assert (
        len(error.what) < 600
        and error.what.isascii()
        and not re.search(r"[\x00-\x1f]", error.what)
        and error.where == "chat_template.jinja"
    )


def test_the_next_prompt_gets_a_new_process() -> None:
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}done", "t")
    assert template.render(n=2) == "done"
    first = template._process
    assert template.render(n=3) == "done" and template._process is first
    refused(lambda: template.render(n=99999), "E112")
    assert template.render(n=2) == "done" and template._process is not first


def test_the_process_ends_with_its_template() -> None:
    template = ChatTemplate("{{ n }}", "t")
    template.render(n=1)
    process = template._process
    assert process is not None and process.poll() is None
    del template
    gc.collect()
    assert process.returncode is not None


def test_a_rendering_that_dies_midway_is_an_error() -> None:
    template = ChatTemplate("{{ n }}", "t")
    template.render(n=1)
    assert template._process is not None
    template._process.kill()
    template._process.wait()
    refused(lambda: template.render(n=1), "E112")
    assert template.render(n=2) == "2"


def test_templates_work_from_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate("{{ n }}", "t")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda n: template.render(n=n), range(40))) == [str(n) for n in range(40)]


def test_a_fork_gets_a_process_of_its_own() -> None:
    code = """if True:
        import os
        from trtllm_thoughtx.text.chat import ChatTemplate
        template = ChatTemplate("{{ n }}", "t")
        template.render(n=1)
        mine = template._process
        child = os.fork()
        text = template.render(n=2)
        if not child:
            os._exit(0 if text == "2" and template._process is not mine else 1)
        assert os.waitpid(child, 0)[1] == 0 and template.render(n=3) == "3" and template._process is mine
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_without_jinja2_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ThoughtxError, match="jinja2 is not installed") as caught:
        ChatTemplate("x", "t").render()
    assert caught.value.code == "E201"


def test_what_the_template_refuses_is_the_prompts_fault(tmp_path: Path) -> None:
    text = loaded(write(tmp_path, chat_template__jinja=LLAMA3))
    error = refused(lambda: text.chat([{"role": "assistant", "content": "x"}]), "E140")
    assert "must alternate" in error.what


def test_without_a_template_a_text_is_encoded_as_it_is(tmp_path: Path) -> None:
    text = loaded(write(tmp_path))
    assert not text.has_template and text.chat("Hi") == text.encode("Hi")
    refused(lambda: text.chat([{"role": "user", "content": "Hi"}]), "E140")
    refused(lambda: text.chat(""), "E140")


@pytest.mark.parametrize(
    "messages",
    [
        [], {}, [1], [{}], [{"role": 1, "content": "x"}], [{"role": "user", "content": 5}], [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "x", "more": {1, 2}}], [{"role": "user", "content": [float("nan")]}],
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(messages: Any) -> None:
    refused(lambda: loaded(SAMPLE).chat(messages), "E140")


def test_half_a_surrogate_pair_is_refused() -> None:
    refused(lambda: loaded(SAMPLE).encode("a\ud800"), "E140")


# --- malformed files ---------------------------------------------------------------------------------------------------

WORDS = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
MALFORMED: dict[str, tuple[str, str, Any, str]] = {
    "empty": ("tokenizer.json", "", None, "E112"),
    "not JSON": ("tokenizer.json", "<html>\x1b[2J", None, "E112"),
    "a list": ("tokenizer.json", "[]", None, "E112"),
    "no model": ("tokenizer.json", "{}", None, "E112"),
    "unknown model": ("tokenizer.json", "", {"version": "1.0", "model": {"type": "Nope"}}, "E112"),
    "deep": ("tokenizer.json", "[" * 100_000, None, "E112"),
    "unk outside": ("tokenizer.json", "", {"version": "1.0", "model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}}, "E112"),
    "dropout": (
        "tokenizer.json",
        "",
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}},
        "E112",
    ),
    "config: not JSON": ("tokenizer_config.json", "{", None, "E112"),
    "config: a list": ("tokenizer_config.json", "", [], "E112"),
    "config: NaN": ("tokenizer_config.json", '{"a": NaN}', None, "E112"),
    "config: token": ("tokenizer_config.json", "", {"eos_token": 5}, "E112"),
    "config: token object": ("tokenizer_config.json", "", {"bos_token": {"content": []}}, "E112"),
    "config: extra": ("tokenizer_config.json", "", {"extra_special_tokens": "abc"}, "E112"),
    "config: added": ("tokenizer_config.json", "", {"added_tokens_decoder": {"-1": {"content": "x"}}}, "E112"),
    "config: added kind": ("tokenizer_config.json", "", {"added_tokens_decoder": [1]}, "E112"),
    "config: template": ("tokenizer_config.json", "", {"chat_template": 3}, "E112"),
    "config: template list": ("tokenizer_config.json", "", {"chat_template": ["x"]}, "E112"),
    "config: template size": ("tokenizer_config.json", "", {"chat_template": "x" * (1 << 21)}, "E112"),
    "map": ("special_tokens_map.json", "", {"eos_token": ["a"]}, "E112"),
    "template: latin-1": ("chat_template.jinja", "latin", None, "E112"),
    "template: size": ("chat_template.jinja", "x" * (1 << 21), None, "E112"),
    "generation: list": ("generation_config.json", "", [1], "E102"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tokenizer_files_are_refused(tmp_path: Path, name: str) -> None:
    file, content, data, code = MALFORMED[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS))
    (tmp_path / file).write_bytes(b"\xff\xfe" if content == "latin" else (content or ("" if data is None else json.dumps(data))).encode())
    error = refused(lambda: Text.load(tmp_path), code)
    assert str(tmp_path) in error.where and "\x1b" not in error.render()


def test_an_absurdly_large_tokenizer_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.json", "wb") as handle:
        handle.truncate((64 << 20) + 1)
    assert "64.0 MiB" in refused(lambda: Text.load(tmp_path), "E112").why


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "model")
    (tmp_path / "secret").write_text("s")
    (root / "chat_template.jinja").symlink_to(tmp_path / "secret")
    refused(lambda: Text.load(root), "E104")


@pytest.mark.filterwarnings("ignore")
def test_a_panic_of_the_tokenizer_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**WORDS, "pre_tokenizer": split}))
    text = loaded(tmp_path)
    refused(lambda: text.encode("a" * 40 + "b"), "E112")
    capfd.readouterr()


def test_a_directory_without_tokenizer_has_no_text(tmp_path: Path) -> None:
    assert Text.load(tmp_path) is None
    assert prompt_ids(Prompt(id="1", input_ids=(5, 6)), None) == [5, 6]
    refused(lambda: prompt_ids(Prompt(id="1", prompt="x"), None), "E140")


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, trtllm_thoughtx.text.text; print([m for m in ('torch', 'jinja2', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_of_all_forms(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    message = {"role": "user", "content": "7 ?"}
    path.write_bytes(
        b'{"prompt": "Q ok"}\r\n\n' + json.dumps({"messages": [message], "id": "m"}).encode() + b'\n{"input_ids": [4, 5], "id": 9}'
    )
    prompts = prompt_rows(path).all()
    assert prompts == [Prompt(id="1", prompt="Q ok"), Prompt(id="m", messages=(message,)), Prompt(id="9", input_ids=(4, 5))]
    text = loaded(SAMPLE)
    assert [prompt_ids(p, text) for p in prompts] == [[4, 4, 7, 2], [4, 24, 6, 2], [4, 5]]
    (tmp_path / "link.jsonl").symlink_to(path)
    assert prompt_rows(tmp_path / "link.jsonl").all() == prompts


@pytest.mark.parametrize(
    "line",
    [
        '"text"', "5", "[]", "{}", "{", '{"prompt": ""}', '{"prompt": 5}', '{"prompt": null}', '{"prompt": "a", "input_ids": [1]}',
        '{"Prompt": "b"}', '{"prompt": "a", "prompt": "b"}', '{"input_ids": []}', '{"input_ids": [1.0]}',
        '{"input_ids": [-1]}',
        '{"input_ids": [true]}', '{"input_ids": [null]}', '{"input_ids": [2147483648]}', '{"input_ids": "5,6"}', '{"messages": []}',
        '{"messages": [{"content": "x"}]}', '{"prompt": "a", "id": ""}', '{"prompt": "a", "id": 1.5}', '{"prompt": "a", "id": "first"}',
        '{"prompt": "\\ud800"}', '{"prompt": NaN}', '\ufeff{"prompt": "a"}',
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "id": "first"}\n\n' + line + "\n")
    assert "line 3" in refused(lambda: prompt_rows(path).all(), "E140").where


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"prompt": "\xff"}\n'])
def test_files_without_prompts_or_utf8_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    refused(lambda: prompt_rows(tmp_path / "p.jsonl").all(), "E140")


def test_a_missing_prompts_file(tmp_path: Path) -> None:
    refused(lambda: prompt_rows(tmp_path / "none.jsonl").all(), "E101")
    refused(lambda: prompt_rows(tmp_path).all(), "E104")
