"""The router's own reading of a model folder gives what transformers gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitserve.config import ModelSettings
from splitserve.errors import ConfigError, InvalidRequest, ModelUnavailable
from splitserve.model.facts import ModelFacts
from splitserve.model.template import ChatTemplate, mentions
from splitserve.model.tokenizer import Tokenizer

TEXTS = [
    "",
    "Hello, world!",
    "  leading and   inner   spaces  \n\n\ttabs",
    "Grüße aus Köln — naïve café, Ærøskøbing",
    "日本語のテキスト、中文文本，한국어 텍스트",
    "مرحبا بالعالم שלום עולם",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 \U0001f9ff",
    "def f(x):\n    return x ** 2  # no comment\n",
    "<|im_start|>user\nspecial tokens in text<|im_end|>",
    "<bos><start_of_turn>user\nhi<end_of_turn>",
    "a" * 300 + "\u2028\u0085\x00\x07",
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi\n there "}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "ünï <|im_end|>"},
    ],
]
# every feature that templates use: loops with break, namespaces, tojson, macros, the generation tag
RICH = """{%- macro say(m) -%}<{{ m.role }}>{{ m.content }}{%- endmacro -%}
{%- set ns = namespace(n=0) -%}{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'stop' %}{% break %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {% generation %}{{ say(m) }}{% endgeneration %}
{%- endfor %}
{%- if tools %}[{{ tools | tojson }}|{{ tools | tojson(indent=2) }}]{% endif %}
{{- ns.n }}{% if add_generation_prompt %}<assistant>{% endif %}"""


def both(folder: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def facts(folder: Path, **settings: Any) -> ModelFacts:
    return ModelFacts.load(folder, Tokenizer.load(folder), ModelSettings(**settings))


def check_equal_to_transformers(folder: Path) -> None:
    ours, theirs = both(folder)
    for text in TEXTS:
        for special in (False, True):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special), text
        ids = theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.special_ids == frozenset(theirs.all_special_ids) | frozenset(
        id for id, token in theirs.added_tokens_decoder.items() if token.special
    )
    assert {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)} == ours.named_tokens
    assert ours.vocab_size == len(theirs)


@pytest.mark.model
def test_ids_and_text_of_smollm2_equal_those_of_transformers(smollm2_folder: Path):
    check_equal_to_transformers(smollm2_folder)


@pytest.mark.model
@pytest.mark.slow
def test_ids_and_text_of_gemma3_equal_those_of_transformers(gemma3_folder: Path):
    check_equal_to_transformers(gemma3_folder)


@pytest.mark.model
def test_token_bytes_join_to_the_bytes_of_the_text(smollm2_folder: Path):
    tokenizer = Tokenizer.load(smollm2_folder)
    for text in TEXTS:
        ids = tokenizer.encode(text, False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert len(text.encode()) <= len(ids) * tokenizer.longest_token_bytes
    assert tokenizer.token_text(tokenizer.encode("<|im_end|>", False)[0]) == "<|im_end|>"


@pytest.mark.model
@pytest.mark.slow
def test_token_bytes_of_a_byte_fallback_vocabulary_join_to_the_bytes_of_the_text(gemma3_folder: Path):
    tokenizer = Tokenizer.load(gemma3_folder)
    for text in (*TEXTS, "\U000e0041"):  # the last is spelled in single bytes
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, False))) == text.encode()


@pytest.mark.model
def test_the_chat_template_of_smollm2_renders_as_in_transformers(smollm2_folder: Path):
    ours, theirs = both(smollm2_folder)
    template = ChatTemplate(facts(smollm2_folder).chat_templates["default"], ours.named_tokens)
    for chat in CHATS:
        for prompt in (False, True):
            text = template.render(chat, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode(text, False) == ids
    open_ended = [*CHATS[1], {"role": "assistant", "content": "The answer is"}]
    assert template.render(
        open_ended, add_generation_prompt=False, continue_final_message=True
    ) == theirs.apply_chat_template(open_ended, tokenize=False, continue_final_message=True)


@pytest.mark.model
def test_a_template_with_every_feature_renders_as_in_transformers(smollm2_folder: Path):
    ours, theirs = both(smollm2_folder)
    template = ChatTemplate(RICH, ours.named_tokens)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"ü": "<&>"}}}]
    chat = [*CHATS[2], {"role": "stop", "content": None, "reasoning": "x"}, {"role": "user", "content": "unseen"}]
    for given in (None, tools):
        assert template.render(chat, tools=given) == theirs.apply_chat_template(
            chat, chat_template=RICH, tools=given, tokenize=False, add_generation_prompt=True
        )


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "__x"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_what_a_template_raises_is_a_refusal_of_the_messages(source: str, complaint: str):
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        ChatTemplate(source, {}).render(CHATS[0])
    assert caught.value.param == "messages"


def test_a_malformed_template_is_an_error_at_start():
    with pytest.raises(ModelUnavailable, match="malformed"):
        ChatTemplate("{% for %}", {})


def test_a_text_that_the_template_drops_cannot_be_continued():
    with pytest.raises(InvalidRequest, match="cannot be continued"):
        ChatTemplate("{{ messages[0].role }}", {}).render(CHATS[0], continue_final_message=True)


def test_a_role_is_found_as_a_word_only():
    assert mentions("m.role == 'developer'", "developer")
    assert not mentions("developers", "developer")


def folder_with(tmp_path: Path, **files: object) -> Path:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    Backend(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def test_ends_are_all_of_the_generation_config_and_the_tokenizers_own(tmp_path: Path):
    folder = folder_with(
        tmp_path,
        config={"max_position_embeddings": 64, "eos_token_id": 9, "vocab_size": 12},
        generation_config={"eos_token_id": [0, 1]},
        tokenizer_config={"eos_token": {"content": "</s>"}},
    )
    found = facts(folder)
    assert found.eos_ids == {0, 1, 2}
    assert (found.max_model_len, found.vocab_size) == (64, 12)


def test_sampling_defaults_come_from_the_model_from_another_folder_or_from_nowhere(tmp_path: Path):
    values = {"temperature": 0.6, "top_k": 64, "top_p": 0.95, "max_new_tokens": 100, "do_sample": True}
    folder = folder_with(tmp_path, config={"n_positions": 64}, generation_config=values)
    auto = facts(folder).defaults
    assert (auto.temperature, auto.top_k, auto.top_p, auto.min_p, auto.max_tokens) == (0.6, 64, 0.95, None, 100)
    assert facts(folder, generation_config=str(folder)).defaults == auto
    assert facts(folder, generation_config="vllm").defaults.temperature is None
    with pytest.raises(ModelUnavailable, match=r"no generation_config\.json"):
        facts(folder, generation_config=str(tmp_path / "elsewhere"))


def test_a_longer_context_than_the_models_is_refused_with_both_numbers(tmp_path: Path):
    folder = folder_with(tmp_path, config={"text_config": {"max_position_embeddings": 64}})
    assert facts(folder, max_model_len=32).max_model_len == 32
    with pytest.raises(ConfigError, match=r"65.*64"):
        facts(folder, max_model_len=65)


def test_chat_templates_are_found_wherever_transformers_stores_them(tmp_path: Path):
    folder = folder_with(
        tmp_path,
        config={"n_positions": 64},
        tokenizer_config={
            "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
        },
    )
    assert facts(folder).chat_templates == {"default": "d", "tool_use": "t"}
    (folder / "chat_template.jinja").write_text("own")
    assert facts(folder).chat_templates["default"] == "own"
    (folder / "given.jinja").write_text("given")
    assert facts(folder, chat_template=str(folder / "given.jinja")).chat_templates == {"default": "given"}
    with pytest.raises(ConfigError, match="no such file"):
        facts(folder, chat_template=str(folder / "absent.jinja"))


def test_a_folder_without_a_fast_tokenizer_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(ModelUnavailable, match="save_pretrained"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelUnavailable, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_add_bos_token_of_the_config_is_followed(tmp_path: Path):
    folder = folder_with(tmp_path, tokenizer_config={"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("a", True) == [tokenizer.id_of("<s>"), 0]
    assert tokenizer.encode("a", False) == [0]


def test_reading_a_tokenizer_loads_neither_torch_nor_transformers():
    code = (
        "import sys, splitserve.model.facts, splitserve.model.template;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{root / 'shared'}:{root / 'services'}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
