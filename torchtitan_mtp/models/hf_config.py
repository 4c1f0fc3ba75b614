"""The config.json of a model of transformers: the one place that imports that package."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

from torch import Tensor

from torchtitan_mtp.errors import UserError, import_optional
from torchtitan_mtp.models.args import ModelArgs


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
    try:
        told, _ = package.PretrainedConfig.get_config_dict(folder, local_files_only=True)
        if told.get("model_type") == "mimo":  # Qwen2's code, but for its modules
            config = package.Qwen2Config.from_dict(told | {"model_type": "qwen2"})
        else:
            auto = package.AutoConfig
            config = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each key has a validator of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: no config.json that transformers can read: {reason}") from error
    if getattr(config, "quantization_config", None) is not None:
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
    """The sizes in a config of transformers; attn_mask_type: None for "causal"."""
    said = functools.partial(getattr, config)
    heads = config.num_attention_heads
    eps = said("rms_norm_eps", None) or said("layer_norm_eps", None) or said("norm_eps", None)
    return ModelArgs(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=said("num_key_value_heads", None) or heads,
        vocab_size=config.vocab_size,
        hidden_dim=said("intermediate_size", None),
        head_size=said("head_dim", None) or config.hidden_size // heads,
        norm_eps=eps or 1e-5,
        max_seq_len=max_seq_len,
        tied_embeddings=bool(said("tie_word_embeddings", False)),
        attn_mask_type=attn_mask_type or "causal",
    )


def without_dropout(config: Any) -> Any:
    """A copy whose dropouts are 0: the forward has no randomness."""
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


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
