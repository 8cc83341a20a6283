"""What the router must know of a model beside its tokenizer: limits, ends, sampling defaults, chat templates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from splitserve.config import ModelSettings
from splitserve.errors import ConfigError
from splitserve.model.files import Json, read_json, read_text
from splitserve.model.tokenizer import Tokenizer

# names of a config's context length, as vLLM looks for them
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions")  # fmt: skip


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling fields that a request left open take these; None: the API's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None  # generation_config's max_new_tokens: a ceiling for every answer, as vLLM has it


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of one model folder under the given settings."""

    max_model_len: int  # prompt plus answer, tokens
    vocab_size: int  # rows of the embedding: ids are below it
    eos_ids: frozenset[int]
    defaults: GenerationDefaults
    chat_templates: dict[str, str]  # "default", and perhaps "tool_use"

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, settings: ModelSettings) -> ModelFacts:
        """Raises ModelUnavailable for unreadable files, ConfigError for settings that the model cannot meet."""
        config = read_json(folder / "config.json", required=True)
        nested = config.get("text_config")
        text = {**config, **cast(Json, nested)} if isinstance(nested, dict) else config
        own = read_json(folder / "generation_config.json")
        return cls(
            max_model_len=_max_model_len(text, settings),
            vocab_size=_whole(text.get("vocab_size")) or tokenizer.vocab_size,
            eos_ids=_eos_ids(own, text, tokenizer),
            defaults=_defaults(own, settings.generation_config),
            chat_templates=_chat_templates(folder, settings.chat_template),
        )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _max_model_len(config: Json, settings: ModelSettings) -> int:
    own = min((n for name in _LENGTHS if (n := _whole(config.get(name))) and n > 0), default=0)
    wanted = settings.max_model_len
    if own and wanted > own:
        raise ConfigError(
            f"--max-model-len {wanted} is over the model's own limit of {own} tokens: give {own} or less",
            param="max_model_len",
        )
    if not own and not wanted:
        raise ConfigError(
            "the model's config.json names no context length: give --max-model-len", param="max_model_len"
        )
    return wanted or own


def _eos_ids(generation: Json, config: Json, tokenizer: Tokenizer) -> frozenset[int]:
    """All ids of generation_config.json, else of config.json; the tokenizer's own end token too (vLLM does the same)."""
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = cast(list[object], value) if isinstance(value, list) else [value]
    own = tokenizer.id_of(tokenizer.named_tokens.get("eos_token", ""))
    return frozenset(n for n in (*map(_whole, ids), own) if n is not None)


def _defaults(own: Json, source: str) -> GenerationDefaults:
    if source == "vllm":
        return GenerationDefaults()
    config = own if source == "auto" else read_json(Path(source) / "generation_config.json", required=True)
    return GenerationDefaults(
        temperature=_number(config.get("temperature")),
        top_p=_number(config.get("top_p")),
        top_k=_whole(config.get("top_k")),
        min_p=_number(config.get("min_p")),
        repetition_penalty=_number(config.get("repetition_penalty")),
        max_tokens=_whole(config.get("max_new_tokens")),
    )


def _chat_templates(folder: Path, file: str) -> dict[str, str]:
    """By name. `file` (--chat-template) goes before chat_template.jinja, that before tokenizer_config.json."""
    if file:
        given = read_text(Path(file))
        if given is None:
            raise ConfigError(f"--chat-template {file}: there is no such file", param="chat_template")
        return {"default": given}
    stored = read_json(folder / "tokenizer_config.json").get("chat_template")
    named: dict[str, str] = {}
    if isinstance(stored, str):
        named["default"] = stored
    elif isinstance(stored, list):
        for entry in cast(list[Json], stored):
            named[str(entry.get("name"))] = str(entry.get("template"))
    extra = folder / "additional_chat_templates"
    for path in sorted(extra.glob("*.jinja")):
        named[path.stem] = read_text(path) or ""
    own = read_text(folder / "chat_template.jinja")
    return named if own is None else {**named, "default": own}
