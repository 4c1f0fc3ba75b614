"""A small model with TorchTitan's names, and what a training run has beside it."""

import copy
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan_mtp.checkpoint import Checkpointer
from torchtitan_mtp.config import Checkpoint
from torchtitan_mtp.optimizer import Schedule

VOCAB, DIM = 24, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq = nn.Linear(DIM, DIM, bias=False)
        self.norm = nn.RMSNorm(DIM)

    def forward(self, x):
        return x + self.wq(self.norm(x))


class Heads(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.heads = nn.ModuleDict({str(i): Block() for i in range(count)})


class TinyModel(nn.Module):
    def __init__(self, heads=2, tied=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(2)})
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight
        self.mtp = Heads(heads) if heads else None

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        heads = [] if self.mtp is None else [head(x) for head in self.mtp.heads.values()]
        return [self.output(self.norm(h)) for h in (x, *heads)]


class Counter:
    """A stand-in for loaders and train states: plain, nested data."""

    def __init__(self, step=0):
        self.state = {"step": step, "files": [["a", 3], ["b", 0.1]], "ids": {"epoch": None}}

    def state_dict(self):
        return copy.deepcopy(self.state)

    def load_state_dict(self, state):
        self.state = state


class Run:
    """Model, AdamW, schedule and counters; `train` does steps on random tokens."""

    def __init__(self, folder, *, heads=2, tied=False, seed=0, model=None, **config):
        self.model = model or TinyModel(heads, tied, seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, betas=(0.9, 0.95))
        self.schedule = Schedule(self.optimizer, lambda s: 1 / (1 + s))
        self.counter = Counter()
        extra = {"lr_scheduler": self.schedule, "train_state": self.counter}
        settings = {"enable": True, "interval": 2, **config}
        self.checkpointer = Checkpointer(
            replace(Checkpoint(), **settings), folder, self.model, self.optimizer, extra
        )

    def train(self, steps, seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        losses = []
        for _ in range(steps):
            tokens = torch.randint(VOCAB, (2, 6))
            loss = sum(
                F.cross_entropy(h[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
                for h in self.model(tokens)
            )
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.counter.state["step"] += 1
            losses.append(loss.item())
        return losses


def snapshot(run):
    """Everything that resuming must bring back, deeply copied."""
    return copy.deepcopy(
        (
            run.model.state_dict(),
            run.optimizer.state_dict(),
            run.schedule.state_dict(),
            run.counter.state,
        )
    )


def equal(a, b):
    """Exact equality of nested states with tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b
