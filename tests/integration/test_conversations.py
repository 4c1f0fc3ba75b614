"""Training on conversations: the losses of the first steps, and a resume in the midst of one."""

from __future__ import annotations

import json

import pytest
import torch

from runs import HEAD_BY_HEAD, SEQUENTIAL, config_of, finish, record, same, train, weights_of
from tests.naive import head_logits
from tests.small_tokenizers import byte_level
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.trainer import Trainer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture
def keys(tmp_path):
    """Of 30 conversations of one to three questions, some longer than a window."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokens = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokens.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    lines = []
    for i in range(30):
        turns = [{"role": "system", "content": "the cat"}] * (i % 2)
        for k in range(1 + i % 3):
            turns.append({"role": "user", "content": f"the {'cat ' * (i * 7 % 5)}{k}?"})
            turns.append({"role": "assistant", "content": "the " * (i * 5 % 13)})
        lines.append(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "talks.jsonl").write_text("".join(lines))
    names = {"model.hf_assets_path": str(folder), "training.dataset": "talks", "training.steps": 3}
    return names | {"training.dataset_path": str(tmp_path / "talks.jsonl")}


@pytest.mark.parametrize("family", [HEAD_BY_HEAD, SEQUENTIAL], ids=["parallel", "chain"])
def test_losses_are_over_what_the_assistant_says(keys, family, tmp_path):
    config = config_of(tmp_path, keys, family, {"model.attn_mask_type": "block_causal"})
    trainer = Trainer(config)
    try:
        run = record(trainer)
        parameters = weights_of(trainer)
        trainer.train()
    finally:
        finish(trainer)
    tokenizer = build_tokenizer(config.model.hf_assets_path)
    source = build_source("talks", config.training.dataset_path)
    tokens, doc_ids, may = DataLoader(source, tokenizer, 32, 3, 2, split="all").next_window()
    sums, counts = torch.zeros(3), [0] * 3
    for row, docs, mask in zip(tokens, doc_ids, may, strict=True):
        logits = head_logits(parameters, row, docs, trainer.model.args, config.mtp)
        for i in range(32):
            for k in (1, 2, 3):
                if mask[i + k] and docs[i] == docs[i + k]:
                    sums[k - 1] -= logits[k - 1][i].log_softmax(-1)[row[i + k]]
                    counts[k - 1] += 1
    assert 5 < counts[0] < 40  # of 64 positions
    assert len(run.losses) == 3
    expected = [s.item() / c for s, c in zip(sums, counts, strict=True)]
    assert run.losses[0] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_is_the_run(keys, tmp_path):
    saving = {"checkpoint.enable": True, "checkpoint.last_save_model_only": False}
    whole = train(config_of(tmp_path / "a", keys))
    first = train(config_of(tmp_path / "b", keys, saving, {"training.steps": 2}))
    second = train(config_of(tmp_path / "b", keys, saving))
    assert first.losses + second.losses == whole.losses and len(second.losses) == 1
    assert same(second.weights, whole.weights)
