"""Validation measures what it says, and leaves the training alone."""

from __future__ import annotations

import logging

import pytest
import torch

from runs import (
    HEAD_BY_HEAD,
    JOINT,
    SEQUENTIAL,
    config_of,
    finish,
    record,
    same,
    train,
    write_corpus,
)
from tests.naive import head_logits, head_loss_sums
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.inference.acceptance import Acceptance
from torchtitan_mtp.trainer import Trainer

FAMILIES = {"joint": JOINT, "head_by_head": HEAD_BY_HEAD, "chain": SEQUENTIAL}
family = pytest.mark.parametrize("keys", FAMILIES.values(), ids=FAMILIES.keys())


@pytest.fixture
def other_text(tmp_path):
    """[validation] on a corpus of its own, some batches of it."""
    corpus = write_corpus(tmp_path / "held_out", "jsonl", count=5, seed=9)
    return {
        "validation.enable": True,
        "validation.dataset": "held_out",
        "validation.dataset_path": corpus["training.dataset_path"],
        "validation.freq": 2,
    }


def held_out_windows(config: JobConfig) -> DataLoader:
    """Windows of 12 tokens, as the validation of `config` reads them."""
    source = build_source("held_out", config.validation.dataset_path)
    tokenizer = build_tokenizer("byte")
    return DataLoader(source, tokenizer, 12, 3, 1, split="all", infinite=False)


@family
def test_losses_are_those_of_a_naive_loop(keys, other_text, tmp_path):
    packed = {"model.attn_mask_type": "block_causal", "validation.seq_len": 12}
    config = config_of(tmp_path, keys, other_text, packed, {"optimizer.lr": 1e-2})
    trainer = Trainer(config)
    try:
        run = record(trainer)
        for _ in range(4):
            trainer.train_step()  # so that heads agree at all
        found = trainer.evaluate()
        assert trainer.evaluate() == found  # the same documents every time
        parameters = {name: p.full_tensor() for name, p in trainer.model.named_parameters()}
    finally:
        finish(trainer)
    sums, valid = [0.0] * 3, [0] * 3
    drafted, agreed, checked, right = ([0] * 2 for _ in range(4))
    with torch.no_grad():
        for tokens, doc_ids, _ in held_out_windows(config):
            s, v = head_loss_sums(parameters, tokens, doc_ids, trainer.model.args, config.mtp)
            sums = [a + b.item() for a, b in zip(sums, s, strict=True)]
            valid = [a + b for a, b in zip(valid, v, strict=True)]
            docs = doc_ids[0].tolist()
            logits = head_logits(parameters, tokens[0], doc_ids[0], trainer.model.args, config.mtp)
            choices = [head.argmax(-1).tolist() for head in logits]
            for i in range(12):
                before = True
                for k in (2, 3):
                    if i + k > 12 or docs[i + k] != docs[i] or docs[i] < 0:
                        break
                    same_token = choices[k - 1][i] == choices[0][i + k - 1]
                    drafted[k - 2] += 1
                    agreed[k - 2] += same_token
                    checked[k - 2] += before
                    before = before and same_token
                    right[k - 2] += before
    assert valid[0] > valid[1] > valid[2] > 50
    expected = [s / v for s, v in zip(sums, valid, strict=True)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert run.acceptance == [Acceptance(drafted, agreed, checked, right)] * 2
    assert agreed[0] > 5


@family
def test_training_does_not_notice_it(keys, other_text, tmp_path):
    plain = train(config_of(tmp_path / "a", keys))
    run = train(config_of(tmp_path / "b", keys, other_text))
    assert run.losses == plain.losses
    assert same(run.weights, plain.weights)
    assert len(run.validated) == 3 and len({loss[0] for loss in run.validated}) == 3


def test_steps_limit_the_batches(other_text, tmp_path):
    """One batch of two rows, against the same rows."""
    one = train(config_of(tmp_path / "a", other_text, {"validation.steps": 1}))
    everything = train(config_of(tmp_path / "b", other_text))
    assert one.losses == everything.losses
    assert one.validated != everything.validated


def test_it_comes_at_the_last_step_too(other_text, tmp_path):
    run = train(config_of(tmp_path, other_text, {"validation.freq": 4, "training.steps": 6}))
    assert len(run.validated) == 2


def test_held_out_documents_are_compared_with_pair_statistics(tmp_path, caplog):
    keys = {"validation.enable": True, "validation.freq": 3, "training.validation_fraction": 0.3}
    with caplog.at_level(logging.INFO, logger="torchtitan_mtp"):
        run = train(config_of(tmp_path, keys))
    assert len(run.validated) == 2
    tables = [r.getMessage() for r in caplog.records if "held-out text" in r.getMessage()]
    assert len(tables) == 1  # at the end only
    for k, loss in enumerate(run.validated[-1], 1):
        assert f"{loss:.4f}" in tables[0], (k, tables[0])
