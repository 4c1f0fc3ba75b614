"""Folders of tiny models as `save_pretrained` writes them, with a tokenizer beside them."""

from pathlib import Path
from typing import Any

import torch
import transformers

from hf_models import CONFIGS, OTHERS
from small_tokenizers import byte_level

VOCABULARY = 272  # of the tokenizer 262


def write_folder(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A model of a family of `CONFIGS` or `OTHERS` with a tokenizer of a few merges."""
    config = (CONFIGS | OTHERS)[family]()
    for key, value in {"vocab_size": VOCABULARY, "max_position_embeddings": 128, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():  # routers, which are born as zeros, too
            param.add_(0.02 * torch.randn_like(param))
    model.save_pretrained(folder)
    tokenizer = byte_level("<|end|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.save_pretrained(folder)
    return folder
