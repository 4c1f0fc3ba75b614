"""Every two values of the keys below train together: two steps of a whole run against the naive
second implementation, its gradients and its own optimizer.

What many train is crossed in full: two families, engine, tied embeddings and precision, all else at
its default. To these come cases until every pair of values that the configuration allows is in one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from runs import config_of, train, weights_of
from spawn import run_ranks
from tests.naive import total_loss
from tests.small import perturb_norms, relative_error
from torchtitan_mtp.config import JobConfig, check
from torchtitan_mtp.config.checks import check_new_run
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.trainer import Trainer

STEPS, LR = 2, 1e-2
RANKS = "ranks"
FACTORS: dict[str, tuple[Any, ...]] = {
    "mtp.heads": ("parallel", "sequential", "medusa"),
    "mtp.engine": ("head_by_head", "joint"),
    "model.args.tied_embeddings": (False, True),
    "training.mixed_precision_param": ("float32", "bfloat16"),
    "mtp.train": ("all", "heads", "trunk"),
    "mtp.loss_scale": (1.0, 0.0),
    "mtp.share_weights": (False, True),
    "mtp.trunk_state": ("normalized", "raw"),
    "mtp.detach_trunk": (False, True),
    "mtp.target": ("labels", "trunk"),
    "activation_checkpoint.mode": ("none", "full", "selective"),
    "activation_checkpoint.selective_ac_option": ("op", "2"),
    "model.name": ("llama3", "deepseek_v3"),
    "training.global_batch_size": (2, 4),  # sequences: one or two micro-batches a step
    RANKS: (1, 2),
}
IN_FULL = {name: FACTORS[name][:2] for name in list(FACTORS)[:4]}
OF_CHAINS = [("mtp.share_weights", True), ("mtp.trunk_state", "raw")]
# Pairs that the configuration refuses.
REFUSED = {
    *((("mtp.heads", "parallel"), of_chain) for of_chain in OF_CHAINS),
    *((("mtp.heads", "medusa"), of_chain) for of_chain in OF_CHAINS),
    (("mtp.heads", "sequential"), ("mtp.engine", "joint")),
    *((("mtp.engine", "joint"), of_chain) for of_chain in OF_CHAINS),
    (("mtp.train", "trunk"), ("mtp.detach_trunk", True)),
    (("mtp.train", "heads"), ("mtp.loss_scale", 0.0)),
}
# Largest error of a loss, and of a gradient, each relative to the largest value. (In bfloat16 a
# token can go to another expert.)
TOLERANCES = {
    ("float32", "llama3"): (1e-5, 1e-4),
    ("float32", "deepseek_v3"): (1e-5, 1e-4),
    ("bfloat16", "llama3"): (1e-2, 5e-2),
    ("bfloat16", "deepseek_v3"): (1e-2, 0.5),
}

Setting = tuple[str, Any]
Case = dict[str, Any]


def pairs_of(case: Case) -> Iterator[tuple[Setting, Setting]]:
    """In the order of FACTORS."""
    return itertools.combinations([(name, case[name]) for name in FACTORS if name in case], 2)


def is_legal(case: Case) -> bool:
    """Whether the configuration takes it."""
    return REFUSED.isdisjoint(pairs_of(case))


def all_pairs() -> list[tuple[Setting, Setting]]:
    settings = [(name, value) for name, values in FACTORS.items() for value in values]
    return [(a, b) for a, b in itertools.combinations(settings, 2) if a[0] != b[0]]


def covering_cases() -> list[Case]:
    """Greedy: take a pair that is missing, then of every other key the value that brings most of
    the missing pairs along."""
    default = {name: values[0] for name, values in FACTORS.items()}
    full = itertools.product(*IN_FULL.values())
    cases = [default | dict(zip(IN_FULL, values, strict=True)) for values in full]
    cases = [case for case in cases if is_legal(case)]
    crossed = {pair for case in cases for pair in pairs_of(case)} | REFUSED
    missing = dict.fromkeys(pair for pair in all_pairs() if pair not in crossed)
    while missing:
        case = dict(next(iter(missing)))
        for name, values in FACTORS.items():
            if name not in case:
                grown = [{**case, name: value} for value in values]
                legal = [c for c in grown if is_legal(c)]
                case = max(legal, key=lambda c: sum(pair in missing for pair in pairs_of(c)))
        for pair in pairs_of(case):
            missing.pop(pair, None)
        cases.append({name: case[name] for name in FACTORS})
    return cases


CASES = covering_cases()


def test_every_pair_that_the_configuration_allows_is_crossed():
    """And those that are left out are those that it refuses."""
    known = options(JobConfig)

    def allowed(case: Case) -> bool:
        config = JobConfig()
        config.model.converters, config.training.local_batch_size = ["mtp"], 1
        for name, value in case.items():
            if name != RANKS:
                known[name].set(config, value)
        try:
            check(config)
            check_new_run(config)
        except UserError:
            return False
        return True

    families = [{"mtp.heads": heads} for heads in FACTORS["mtp.heads"]]
    refused = {p for p in all_pairs() if not any(allowed(of | dict(p)) for of in families)}
    assert refused == REFUSED
    crossed = {pair for case in CASES for pair in pairs_of(case)}
    assert crossed == set(all_pairs()) - refused
    assert len(CASES) < 35


def run_case(folder: Path, case: Case) -> dict[str, Any]:
    """What this rank saw of a run."""
    keys = {name: value for name, value in case.items() if name != RANKS}
    seen: dict[str, Any] = {"windows": [], "gradients": [], "weights": []}

    def prepare(trainer: Trainer) -> None:
        perturb_norms(trainer.model)
        seen["args"], seen["mtp"] = trainer.model.args, trainer.config.mtp
        seen["trained"] = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        next_window, step = trainer.loader.next_window, trainer.optimizer.step

        def keep_window() -> Any:
            seen["windows"].append(next_window())
            return seen["windows"][-1]

        def keep_step(*args: Any) -> None:
            seen["weights"].append(weights_of(trainer))
            seen["gradients"].append(
                {
                    name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                    for name, p in trainer.model.named_parameters()
                }
            )
            step(*args)

        trainer.loader.next_window = keep_window  # type: ignore[method-assign]
        trainer.optimizer.step = keep_step  # type: ignore[method-assign]

    small = {
        "model.attn_mask_type": "block_causal",
        "training.steps": STEPS,
        "training.seq_len": 7,
        "model.args.n_layers": 2,
        "training.local_batch_size": 2 // case[RANKS],
        "lr_scheduler.warmup_steps": 0,
        "optimizer.lr": LR,
    }
    config = config_of(folder, small, keys)
    config.job.dump_folder = str(folder.parent / f"run{folder.name.partition('-')[2]}")
    run = train(config, prepare)
    return seen | {"logged": run.logged, "end": run.weights}


def run_cases(rank: int, folder: Path, cases: list[Case]) -> list[dict[str, Any]]:
    return [run_case(folder / f"{rank}-{i}", case) for i, case in enumerate(cases)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Callable[[int], list[dict[str, Any]]]:
    """The number of a case -> what its ranks saw; the ranks of all cases are started once."""
    folder = tmp_path_factory.mktemp("combinations")
    two = [case for case in CASES if case[RANKS] == 2]
    of_ranks = run_ranks(2, run_cases, folder, two)

    def find(i: int) -> list[dict[str, Any]]:
        if CASES[i][RANKS] == 1:
            return [run_case(folder / str(i), CASES[i])]
        return [seen[two.index(CASES[i])] for seen in of_ranks]

    return find


def naive_steps(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same steps in one process, in float64: total, losses, norm, and clipped gradients by
    name, None where no loss reaches."""
    seen, steps = ranks[0], []
    p = {n: w.double().requires_grad_(n in seen["trained"]) for n, w in seen["weights"][0].items()}
    trained = [p[name] for name in sorted(seen["trained"])]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    micro_batches = len(seen["windows"]) // STEPS
    for step in range(STEPS):
        mine = slice(step * micro_batches, (step + 1) * micro_batches)
        windows = [window for rank in ranks for window in rank["windows"][mine]]
        for name, value in p.items():
            if name.endswith(".expert_bias"):  # how these move is tested with the experts
                value.copy_(seen["weights"][step][name])
        optimizer.zero_grad()
        tokens, doc_ids = (torch.cat([w[i] for w in windows]) for i in (0, 1))
        total, losses = total_loss(p, tokens, doc_ids, seen["args"], seen["mtp"])
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        if seen["mtp"].loss_scale == 0:  # and so are the gradients of what only these losses reach
            for name in seen["trained"]:
                if name.startswith("mtp."):
                    assert not p[name].grad.any()
                    p[name].grad = None
        gradients = {n: None if v.grad is None else v.grad.clone() for n, v in p.items()}
        steps.append(
            {"total": total.item(), "losses": losses, "norm": norm, "gradients": gradients}
        )
        optimizer.step()
    return steps


@pytest.fixture(scope="module")
def naive() -> Callable[..., list[dict[str, Any]]]:
    """`naive_steps`, once for cases that differ in how the same is computed."""
    how = ("mtp.engine", "training.mixed_precision_param")
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}

    def find(case: Case, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        what = tuple(v for n, v in case.items() if not n.startswith("activ") and n not in how)
        return found.get(what) or found.setdefault(what, naive_steps(ranks))

    return find


@pytest.mark.distributed
@pytest.mark.parametrize("i", range(len(CASES)))
def test_two_steps_are_the_naive_ones(i, results, naive):
    case, ranks = CASES[i], results(i)
    of_loss, of_gradient = TOLERANCES[case["training.mixed_precision_param"], case["model.name"]]
    steps = naive(case, ranks)
    for rank in ranks:
        assert [step["step"] for step in rank["logged"]] == [1, 2]
        for logged, expected in zip(rank["logged"], steps, strict=True):
            assert logged["global_total_loss"] == pytest.approx(expected["total"], rel=of_loss)
            assert logged["head_losses"] == pytest.approx(expected["losses"], rel=of_loss)
            assert logged["grad_norm"] == pytest.approx(expected["norm"], rel=of_gradient)
        # The first step's: a first update parts weights by more than rounding did.
        for name, found in rank["gradients"][0].items():
            if (gradient := steps[0]["gradients"][name]) is None:
                assert found is None, name
                assert torch.equal(rank["end"][name], rank["weights"][0][name]), name
            else:
                assert relative_error(found.double(), gradient) < of_gradient, name
