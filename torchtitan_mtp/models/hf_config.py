"""The config.json of a model of transformers: the one place that imports that package."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from torchtitan_mtp.errors import UserError, hub_hint, import_optional
from torchtitan_mtp.models.args import ModelArgs

_COUNTS = ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")
_SAID = (
    *("num_key_value_heads", "intermediate_size", "head_dim", "tie_word_embeddings"),
    *("rms_norm_eps", "layer_norm_eps", "norm_eps"),
)


# Where a folder says that its weights are quantised: keys of config.json, and a file beside it.
_QUANTISATIONS = ("quantization_config", "compression_config", "quantization")
_QUANTISED = "hf_quant_config.json"


def error_line(error: Exception) -> str:
    """What transformers says of something, in a line that is not too long."""
    return " ".join(str(error).split())[:200]


def transformers(what: str) -> Any:
    """The package. Error: it is not installed; `what` needs it."""
    # It imports torchao where that is, whose warnings are not of what happens here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return import_optional("transformers", f'{what} needs transformers: pip install "transformers"')


def read_config(folder: str) -> Any:
    """transformers' config of a model's folder.

    Raises:
        UserError: no config.json of a model that transformers has, in plain weights, of text, or
            with a language model in it that transformers loads alone.
    """
    package = transformers('model.name = "hf"')
    if not Path(folder, "config.json").is_file():
        wanted = "expected the folder of a model of transformers (model.hf_assets_path; --from)"
        raise UserError(f"{folder}: no config.json in it; {wanted}{hub_hint(folder)}")
    try:
        told, _ = package.PretrainedConfig.get_config_dict(folder, local_files_only=True)
        if told.get("model_type") == "mimo":  # Qwen2's code, but for its modules
            config = package.Qwen2Config.from_dict(told | {"model_type": "qwen2"})
        else:
            auto = package.AutoConfig
            config = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each key has a validator of its own
        what = f"no config.json that transformers can read: {error_line(error)}"
        raise UserError(f"{folder}: {what}") from error
    if Path(folder, _QUANTISED).is_file() or any(told.get(key) for key in _QUANTISATIONS):
        raise UserError(f"{folder}: its weights are quantised; take the folder before that")
    text = config.get_text_config()
    if text is not config:
        alone = package.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if alone is None or alone.config_class is not type(text):
            raise UserError(
                f"{folder}: model_type = {config.model_type!r} is a model of more than text; "
                "expected one of text alone"
            )
        text.architectures = config.architectures
    return text


def config_of(told: dict[str, Any]) -> Any:
    """transformers' config of what `to_diff_dict` told of one."""
    return transformers('model.name = "hf"').AutoConfig.for_model(**told)


def sizes_of_config(config: Any, max_seq_len: int, attn_mask_type: str | None) -> ModelArgs:
    """The sizes in a config of transformers; attn_mask_type: None for "causal". Error: it has no
    such sizes."""
    try:
        counts = {key: getattr(config, key) for key in _COUNTS}
        said = {key: getattr(config, key, None) for key in _SAID}
    except Exception as error:  # sizes that differ from layer to layer have an error of their own
        raise UserError(
            f"config.json: model_type = {config.model_type!r} has not the sizes of a decoder with "
            f"attention of one width: {error_line(error)}"
        ) from error
    for key, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise UserError(f"config.json: {key} = {count!r}, expected an integer above 0")
    heads, width, layers, rows = counts.values()
    return ModelArgs(
        dim=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=said["num_key_value_heads"] or heads,
        vocab_size=rows,
        hidden_dim=said["intermediate_size"],
        head_size=said["head_dim"] or width // heads,
        norm_eps=said["rms_norm_eps"] or said["layer_norm_eps"] or said["norm_eps"] or 1e-5,
        max_seq_len=max_seq_len,
        tied_embeddings=bool(said["tie_word_embeddings"]),
        attn_mask_type=attn_mask_type or "causal",
    )


def document_masks(config: Any, x: Tensor, positions: Tensor) -> dict[str, Any]:
    """Masks of each kind of attention of embeddings x [B, S, D], whose documents begin where
    positions [B, S] are 0."""
    masking = transformers("a mask").masking_utils
    given = {
        "config": config,
        "inputs_embeds": x,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": positions,
    }
    masks = {"full_attention": masking.create_causal_mask(**given)}
    if getattr(config, "sliding_window", None):
        masks["sliding_attention"] = masking.create_sliding_window_causal_mask(**given)
    return masks
