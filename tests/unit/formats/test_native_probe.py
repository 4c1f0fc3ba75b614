"""Folders whose modules draft right only if each part of them is read as its engine reads it.

No layer adds anything, so a state is its token's embedding, and the models count: E[t] has the
cosines and sines of D/2 frequencies at t, E[t+q] = R^q E[t], and the output's row of t + 1 is
E[t] / s under a final norm of weight s. Module k says t + 2 at t, since its two halves make

    (1 + g R^q) E[t+1] + (R - g R^(q+1)) E[t] = 2 E[t+1]

of the embedding of t + 1 and the state of t, times s and over the weight of its own norm, which
take those of enorm, hnorm and s back. If anything is read otherwise, g R^q E[t+1], the larger,
stays, and drafts are other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_native_modules import config_of, loaded, write_run
from torch import Tensor

from native_folders import LAYERS, RELEASED, write_native
from torchtitan_mtp.formats import export_checkpoint
from torchtitan_mtp.inference import Stats, generate, load_for_inference

WRONG, FAR = 10.0, 37  # g and q
SILENT = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
SERVED = ("deepseek_v3", "glm4_moe", "mellum")  # by transformers
PROMPT, STEPS = [7, 30, 100], 3


def angles(width: int, vocabulary: int) -> Tensor:
    """Of each frequency, at one token [D/2]."""
    frequencies = torch.randperm(vocabulary // 2 - 1)[: width // 2] + 1
    return 2 * math.pi / vocabulary * frequencies.double()


def rotation(angle: Tensor) -> Tensor:
    """R of E[t+1] = R E[t], [D, D]."""
    cos, sin = angle.cos().diag(), angle.sin().diag()
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))


def uneven(width: int) -> Tensor:
    """A norm's weight [D] with both signs, under which embeddings are still of one size."""
    sizes = (torch.rand(width // 2, dtype=torch.float64) * 1.5 + 0.5).repeat(2)
    return sizes * (torch.randint(2, (width,)) * 2 - 1)


def write_probe(folder: Path, name: str) -> None:
    """`write_native`'s folder with weights that count."""
    write_native(folder, name, RELEASED[name].modules)
    files = {file: load_file(file) for file in folder.glob("model-*.safetensors")}
    tensors = {key: tensor for held in files.values() for key, tensor in held.items()}
    kind, off = RELEASED[name], float(name.startswith("qwen"))  # theirs multiply by 1 + weight
    vocabulary, width = tensors["lm_head.weight"].shape
    angle, trunk = angles(width, vocabulary), uneven(width)
    at = torch.arange(vocabulary).unsqueeze(1) * angle
    embedding, turn = torch.cat((at.cos(), at.sin()), -1), rotation(angle)
    far = WRONG * rotation(FAR * angle)
    new = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": trunk - off,
        "lm_head.weight": embedding.roll(1, 0) / trunk,
    }
    for k in range(kind.modules):
        seen = torch.ones(width) if kind.raw and not k else trunk
        enorm, hnorm, norm = uneven(width), uneven(width), uneven(width)
        emb = (torch.eye(width) + far) / (math.sqrt(2) * enorm)
        hidden = (turn - far @ turn) * (seen.square().mean() / 2).sqrt() / (hnorm * seen)
        halves = (hidden, emb) if kind.hidden_first else (emb, hidden)
        proj = (trunk / norm).unsqueeze(1) * torch.cat(halves, 1)
        parts = {"enorm": enorm - off, "hnorm": hnorm - off, "eh_proj": proj, "norm": norm - off}
        for part, value in parts.items():
            new[kind.own[part].format(k=k, layer=LAYERS + k)] = value
    assert new.keys() <= tensors.keys()
    for file, held in files.items():
        silent = {key: 0 * tensor for key, tensor in held.items() if key.endswith(SILENT)}
        counting = {key: new[key].float().contiguous() for key in held.keys() & new.keys()}
        save_file(held | silent | counting, file, {"format": "pt"})


def counted(new: int) -> list[int]:
    """So many tokens behind the prompt."""
    return list(range(PROMPT[-1] + 1, PROMPT[-1] + 1 + new))


def decoded(model: Any) -> Stats:
    """Of some steps of a text that counts, whatever the drafts are."""
    new = 1 + STEPS * model.spec.num_future_tokens
    found = generate(model, [PROMPT], new, speculative=True)
    assert found.tokens[0] == counted(new)
    return found.stats


def every_draft_is_right(model: Any) -> bool:
    stats, n = decoded(model), model.spec.num_future_tokens
    return stats.right == stats.checked == [STEPS] * (n - 1) and stats.tokens_per_step == n


def misread(model: Any, k: int) -> Iterator[str]:
    """Module k as it must not be read, one way after another, and then as it was."""
    head = model.mtp.heads[k]
    for part in ("enorm", "hnorm", "norm", "eh_proj"):
        weight = getattr(head, part).weight
        kept = weight.clone()
        weight.copy_(weight.roll(weight.shape[-1] // 2 if part == "eh_proj" else 1, -1))
        yield part
        weight.copy_(kept)
    if k == 0:
        kept = model.mtp.trunk_state
        model.mtp.trunk_state = "normalized" if kept == "raw" else "raw"
        yield "trunk_state"
        model.mtp.trunk_state = kept


@pytest.mark.parametrize("name", RELEASED)
def test_every_draft_is_right_of_modules_that_are_read_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, modules = tmp_path / "model", RELEASED[name].modules
    write_probe(source, name)
    config = config_of(source, modules + 1, RELEASED[name].raw)
    model: Any = loaded(source, config)
    model.mtp.heads[0].eh_proj.weight.mul_(2)  # changes no draft, and the file
    run = write_run(tmp_path / "run", model, config)
    model = load_for_inference(run)[0]
    assert every_draft_is_right(model)
    for k in range(modules):
        for part in misread(model, k):
            stats = decoded(model)
            assert 2 * stats.right[k] < stats.checked[k], part
    assert every_draft_is_right(model)
    if name in SERVED:
        export_checkpoint(run, tmp_path / "out", "same")
        patterns = [rf"model\.layers\.{LAYERS + k}\." for k in range(modules)] + [r"^mtp\."]
        cls = getattr(transformers, RELEASED[name].architecture)
        monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", patterns)
        assert forwards(tmp_path / "out", modules) == [len(PROMPT), *[modules + 1] * STEPS]


def forwards(folder: Path, modules: int) -> list[int]:
    """How many tokens each forward of transformers' model takes, drafting with the modules."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, options: sizes.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    options = {"do_sample": False, "eos_token_id": None, "use_mtp": True}
    new = 1 + STEPS * (modules + 1)
    text = model.generate(torch.tensor([PROMPT]), max_new_tokens=new, **options)[0]
    assert text[len(PROMPT) :].tolist() == counted(new)
    return sizes
