"""Configurations: mutated recipes, any value in any key, any command line; then what is built of
them before a device is touched."""

from __future__ import annotations

import random
from pathlib import Path

from fuzzing.mutations import PIECES, edited
from torchtitan_mtp.build import model_args_from_config
from torchtitan_mtp.config import JobConfig, parse_args
from torchtitan_mtp.config.setting import Option
from torchtitan_mtp.config.torchtitan import known_options
from torchtitan_mtp.data.run import micro_batches_per_step
from torchtitan_mtp.data.targets import IGNORE  # noqa: F401  (imported before the first case)
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import add_heads, head_weights
from torchtitan_mtp.optimizer import build_optimizer, build_scheduler

RECIPES = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))
NUMBERS = [0, 1, -1, 2, 3, 7, 8, 64, 1000, 2**31, 2**63, -(2**63), 10**30]
FLOATS = [0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, -1.5]
LARGEST = 1_000_000  # of any size that is planned
MOST = 100  # of what costs time in proportion: layers, heads, experts


def case(rng: random.Random, folder: Path) -> None:
    """Read one configuration and plan the run. Raises UserError where it can't be."""
    file = folder / "run.toml"
    kind = rng.randrange(3)
    argv = ["--job.config_file", str(file)]
    file.write_bytes(b"")
    if kind == 0:
        file.write_bytes(edited(rng.choice(RECIPES).read_bytes(), rng))
    elif kind == 1:
        file.write_bytes(_table_of(rng))
    else:
        argv = _command_line(rng, argv)
    plan(parse_args(argv))


def plan(config: JobConfig) -> None:
    """What the trainer makes of a configuration, on the meta device."""
    heads = config.mtp.num_future_tokens = config.num_future_tokens
    args = model_args_from_config(config, 259)
    micro_batches_per_step(config, 1)
    sizes = [args.n_layers, args.dim, heads, args.max_seq_len, args.vocab_size or 0]
    experts = args.moe.num_experts if args.moe is not None else 0
    if max(sizes) > LARGEST or max(args.n_layers, heads, experts) > MOST:
        return
    model = build_model(args)
    add_heads(model, config.mtp)
    optimizer = build_optimizer(model.parameters(), config.optimizer)
    build_scheduler(optimizer, config.lr_scheduler, config.training.steps)
    head_weights(config.mtp, 1, config.training.steps)


def _keys() -> list[Option]:
    return [option for option in known_options().values() if not option.is_table]


def _value(option: Option, rng: random.Random) -> str:
    """Mostly of the key's own type."""
    if rng.random() < 0.3:
        return rng.choice(PIECES).decode("utf-8", errors="replace")
    default = option.default
    if isinstance(default, bool):
        return rng.choice(["true", "false"])
    if isinstance(default, int):
        return str(rng.choice(NUMBERS))
    if isinstance(default, float):
        return str(rng.choice(FLOATS))
    if isinstance(default, list):
        words = rng.sample(["mtp", "float8", "model", "loss", "optimizer", "x"], rng.randint(0, 3))
        return "[" + ", ".join(f'"{word}"' for word in words) + "]"
    word = rng.choice(
        ["", "debugmodel", "8B", "sequential", "parallel", "custom", "op", "2", "mean"]
    )
    return rng.choice([f'"{word}"', str(rng.choice(NUMBERS)), str(rng.choice(FLOATS))])


def _table_of(rng: random.Random) -> bytes:
    lines = []
    for option in rng.sample(_keys(), rng.randint(1, 4)):
        lines.append(f"[{'.'.join(option.path[:-1])}]\n{option.path[-1]} = {_value(option, rng)}\n")
    return "".join(lines).encode("utf-8", errors="replace")


def _command_line(rng: random.Random, argv: list[str]) -> list[str]:
    recipe = [str(rng.choice(RECIPES))] if rng.random() < 0.5 else [argv[1]]
    words = [argv[0], *recipe]
    for option in rng.sample(_keys(), rng.randint(0, 4)):
        name = (
            option.name
            if rng.random() < 0.9
            else edited(option.name.encode(), rng).decode(errors="replace")
        )
        value = _value(option, rng).strip('"[]').replace('"', "")
        words += rng.choice([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]])
    return [word for word in words if word not in ("-h", "--help")]
