"""Sizes that can't fit are refused before anything is read, in one line that names the key."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from runs import TINY, config_of
from torchtitan_mtp import trainer
from torchtitan_mtp.config import JobConfig, parse_args
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.distributed import memory, mesh
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.trainer import Trainer

CPU = torch.device("cpu")
INTEGERS = [
    name
    for name, option in options(JobConfig).items()
    if str(option.type) in ("<class 'int'>", "int | None")
]


def test_no_integer_of_the_configuration_is_absurd():
    assert len(INTEGERS) > 40
    for name in INTEGERS:
        with pytest.raises(UserError) as caught:
            parse_args([f"--{name}", str(10**20)])
        message = str(caught.value)
        assert message.startswith(f"{name} = {10**20}: expected ") and "\n" not in message
    assert parse_args(["--training.seed", str(2**63 - 1)]).training.seed == 2**63 - 1
    assert parse_args(["--training.steps", str(2**31 - 1)]).training.steps == 2**31 - 1
    with pytest.raises(UserError, match=r"steps = 2147483648: expected at most 2147483647$"):
        parse_args(["--training.steps", str(2**31)])


@pytest.mark.parametrize(
    ("files", "expected"),
    [({}, 24), ({"memory.max": "max\n"}, 24), ({"memory.max": f"{5 << 30}\n"}, 5)],
)
def test_memory_of_the_machine_and_of_its_control_group(files, expected, tmp_path, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": (24 << 30) // 4096}
    monkeypatch.setattr(memory.os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(memory, "LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert memory.total_memory(CPU) == expected << 30


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: 24 << 30)
    memory.check_memory({"a": 12 << 30, "b": 12 << 30}, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    memory.check_memory({"a": 6 << 30}, CPU)
    with pytest.raises(UserError) as caught:
        memory.check_memory({"a": 1 << 30, "b": 6 << 30}, CPU)
    assert str(caught.value) == (
        "b: needs 6.0 GiB of memory, all together at least 7.0, and a rank has 6.0 (cpu); lower it"
    )


BATCH = "training.local_batch_size"


@pytest.mark.parametrize(
    ("keys", "named", "gib"),
    [
        # int64 of 3 labels, 2 future tokens, token, position, document: 8 * 8 bytes a place.
        ({BATCH: 2**31 - 1}, f"{BATCH} = 2147483647, seq_len = 32: ", 8 * 8 * 32 * 2),
        ({"training.seq_len": 2**30}, f"{BATCH} = 2, seq_len = 1073741824: ", 8 * 8 * 2),
        (
            {"training.global_batch_size": 2**31 - 2},
            f"{BATCH} = 2, seq_len = 32, 1,073,741,823 of them a step: ",
            8 * 8 * 32 * 2,
        ),
        (
            {"validation.enable": True, "validation.local_batch_size": 2**30},
            "validation.local_batch_size = 1073741824, seq_len = 32: ",
            8 * 8 * 32,
        ),
        # Two tables of angles, float32, for half of the 8 dimensions of a head.
        ({"validation.seq_len": 2**31 - 1}, "seq_len = 2147483647: ", 4 * 4 * 2 * 2),
        # Weights, gradients and two moments in float32; embedding and unembedding 32 wide.
        ({"model.vocab_size": 2**28}, "tok_embeddings.weight", 4 * 4 * 2 * 32 / 4),
    ],
)
def test_a_run_that_cannot_fit(keys, named, gib, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: 24 << 30)
    monkeypatch.setattr(mesh, "local_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(trainer, "loaders_from_config", lambda *_: pytest.fail("data was read"))
    with pytest.raises(UserError) as caught:
        Trainer(config_of(tmp_path, keys))
    torch.distributed.destroy_process_group()
    message = str(caught.value)
    assert named in message and "a rank has 24.0 (cpu); lower it" in message
    found = float(message.split("needs ")[1].split(" GiB")[0].replace(",", ""))
    assert found == pytest.approx(gib, rel=2e-3)


def test_what_is_on_a_gpu_is_held_against_it(tmp_path, monkeypatch):
    """And the batches, which the loader makes, against the machine."""
    seen = []
    monkeypatch.setattr(memory, "check_memory", lambda needs, device: seen.append((needs, device)))

    class Stop(Exception):
        pass

    def stop(config, model, device, *rest):
        check(config, model, torch.device("cuda"), *rest)
        raise Stop

    check = memory.check_run
    monkeypatch.setattr("torchtitan_mtp.trainer.check_run", stop)
    for offload in (False, True):
        with pytest.raises(Stop):
            Trainer(config_of(tmp_path, {"training.enable_cpu_offload": offload}))
        torch.distributed.destroy_process_group()
    for i, (needs, device) in enumerate(seen):
        weights, batches = (any(word in key for key in needs) for word in ("weights", "local_"))
        assert device.type == ("cuda", "cpu")[i % 2] and batches == (i % 2 == 1)
        assert weights == (i in (0, 3))


def test_weights_alone_do_for_a_seed(tmp_path, monkeypatch):
    """A seed checkpoint of a model that many ranks are going to train, made on one machine."""
    config = config_of(tmp_path)
    model = build_model(replace(TINY, vocab_size=256))
    size = sum(4 * p.numel() for p in model.parameters())
    monkeypatch.setattr(memory, "total_memory", lambda device: 2 * size)
    with pytest.raises(UserError, match=f"weights: needs {4 * size / 2**30:.1f} GiB"):
        memory.check_run(config, model, CPU, 1, 1)
    memory.check_run(config, model, CPU, 4, 1)
    config.checkpoint.enable = config.checkpoint.create_seed_checkpoint = True
    memory.check_run(config, model, CPU, 1, 1)


def test_what_ranks_share_and_what_each_of_them_has(tmp_path, monkeypatch):
    """Replicas have the weights each; a chunk's logits are spread over the ranks of tensor
    parallelism, and are of one micro-batch where a pipeline splits what a loader gives."""
    config = config_of(tmp_path, {BATCH: 4, "loss.chunk_rows": 10**6})
    for name in ("data_parallel_replicate", "tensor_parallel", "pipeline_parallel"):
        setattr(config.parallelism, f"{name}_degree", 2)
    model, seen = build_model(replace(TINY, vocab_size=256)), []
    monkeypatch.setattr(memory, "check_memory", lambda needs, device: seen.append(needs))
    memory.check_run(config, model, CPU, 8, 1)
    (needs,), size = seen, sum(4 * p.numel() for p in model.parameters())
    found = {key.split()[0]: number for key, number in needs.items()}
    assert found["loss.chunk_rows"] == 2 * config.training.seq_len * 256 / 2
    assert found["model.args,"] == 4 * (size // 4)
