"""What a checkpoint folder says about its model: config.json and generation_config.json, checked.

Knows nothing of torch and of weights: the coordinator and the server read it too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tprt.errors import CheckpointError, ConfigError, UnsupportedModelError

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Parameters of a rotary embedding that is stretched beyond its training length (`llama3` rule)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """The fields of config.json that tprt uses, under their Hugging Face names."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]


def read_checkpoint_config(folder: str) -> CheckpointConfig:
    """Read and check the configuration of the checkpoint in `folder`.

    Raises:
        CheckpointError: no such folder, no config.json, or a field is missing or impossible.
        UnsupportedModelError: a variant (rotary scaling, activation) that tprt does not compute.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"model.path: there is no folder {folder!r} (looked at {path.absolute()})")
    raw = _read_json(path / "config.json", required=True)
    generation = read_generation_config(folder)
    fields = _Fields(raw, path / "config.json")
    heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    rope_theta, rope_scaling = _rope(fields)
    return CheckpointConfig(
        architecture=_architecture(fields),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(fields, heads),
        head_dim=fields.integer("head_dim", hidden_size // heads),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        hidden_act=_activation(fields),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        eos_token_ids=_eos_token_ids(raw, generation),
    )


def read_generation_config(folder: str) -> dict[str, Any]:
    """Return what the checkpoint's generation_config.json holds; nothing where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    return _read_json(Path(folder) / GENERATION_CONFIG, required=False)


def end_token_ids(folder: str, checkpoint: CheckpointConfig) -> tuple[int, ...]:
    """Return the tokens that end an output: those of the configs, and what the tokenizer calls its `eos_token`.

    As in vLLM: whoever tunes a checkpoint to end its turns by another token often says so there alone.

    Raises:
        CheckpointError: a file of the tokenizer is no JSON object.
    """
    settings = _read_json(Path(folder) / "tokenizer_config.json", required=False)
    named = settings.get("eos_token")
    name = named.get("content") if isinstance(named, dict) else named
    token_id = None if name is None else _added_token_id(Path(folder), settings, name)
    if token_id is None or token_id in checkpoint.eos_token_ids or token_id >= checkpoint.vocab_size:
        return checkpoint.eos_token_ids
    return (*checkpoint.eos_token_ids, token_id)


def _added_token_id(folder: Path, settings: dict[str, Any], name: object) -> int | None:
    """Return the id of a token that tokenizer_config.json or tokenizer.json lists as added."""
    listed = settings.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        added = _read_json(folder / "tokenizer.json", required=False).get("added_tokens") or []
        listed = {token["id"]: token for token in added}
    return next((int(token_id) for token_id, token in listed.items() if token.get("content") == name), None)


def resolve_max_model_len(checkpoint: CheckpointConfig, wanted: int | None) -> int:
    """Return the most tokens of one sequence: `wanted`, or what the checkpoint was made for.

    Raises:
        ConfigError: `wanted` is more than the checkpoint's positions.
    """
    most = checkpoint.max_position_embeddings
    if wanted is not None and wanted > most:
        raise ConfigError(
            f"model.max_model_len is {wanted}, but the checkpoint has {most} positions"
            " (max_position_embeddings); lower it"
        )
    return wanted or most


@dataclass(frozen=True, slots=True)
class _Fields:
    raw: dict[str, Any]
    path: Path

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.path}: {name} is {value!r}; expected a positive integer")
        return value


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise CheckpointError(
                f"{path.parent} has no {path.name}; expected a Hugging Face checkpoint folder"
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected a JSON object")
    return content


def _architecture(fields: _Fields) -> str:
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{fields.path}: architectures is {names!r}; expected a list of one name")
    return names[0]


def _kv_heads(fields: _Fields, heads: int) -> int:
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{fields.path}: {heads} attention heads cannot share {kv_heads} key/value heads evenly"
        )
    return kv_heads


def _activation(fields: _Fields) -> str:
    name = str(fields.raw.get("hidden_act", "silu"))
    if name != "silu":
        raise UnsupportedModelError(f"{fields.path}: hidden_act is {name!r}; tprt computes silu only")
    return name


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Read the rotary parameters: `rope_parameters` since transformers 5, two fields before."""
    raw = fields.raw
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModelError(
            f"{fields.path}: rotary embedding of type {kind!r}; tprt computes 'default' and 'llama3'"
        )
    try:
        return theta, RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{fields.path}: the llama3 rotary embedding lacks {error}") from None


def _eos_token_ids(raw: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id", raw.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
