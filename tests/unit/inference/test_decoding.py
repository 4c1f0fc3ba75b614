"""Decoding with caches and drafts against full forwards without either."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_models import (
    FAMILIES,
    RAW,
    batch_of,
    head_logits,
    naive_greedy,
    random_model,
    scripted_model,
)

from torchtitan_mtp.data.targets import Window, make_batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference import drafting, generate, next_logits
from torchtitan_mtp.inference.decoding import Decoder
from torchtitan_mtp.inference.rows import Rows
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.inference.stacking import stack
from torchtitan_mtp.mtp.engine import head_by_head
from torchtitan_mtp.ops import LossOptions

PROMPT = [3, 1, 4, 1, 5]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8]]


def count_calls(module: torch.nn.Module) -> list[int]:
    """The sequence lengths that a module is called with, in a list that grows."""
    sizes: list[int] = []
    module.register_forward_hook(lambda _module, args, _out: sizes.append(args[0].shape[1]))
    return sizes


@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_plain_decoding_with_a_cache_equals_a_full_forward_a_token(heads: str, share: bool) -> None:
    model = random_model(heads, 4, share, seed=4)
    expected = naive_greedy(model, PROMPT, 20, 4)
    assert len(set(expected)) > 3  # not one token over and over
    assert generate(model, [PROMPT], 20).tokens == [expected]


@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_decoding_with_biases_of_queries_keys_and_values(heads: str, share: bool) -> None:
    model = random_model(heads, 4, share, seed=3, qkv_bias=True)
    expected = naive_greedy(model, PROMPT, 20, 4)
    assert len(set(expected)) > 3
    for speculative in (False, True):
        assert generate(model, [PROMPT], 20, speculative=speculative).tokens == [expected]


def test_a_model_without_heads_decodes() -> None:
    model = random_model(n=1)
    assert generate(model, [PROMPT], 12).tokens == [naive_greedy(model, PROMPT, 12, 1)]


@pytest.mark.parametrize(
    ("heads", "share", "n", "seed"),
    [
        # Each family with each n, of one seed in turn; with the other exhaustively.
        pytest.param(*family, n, seed, marks=() if (i + j + k) % 2 else pytest.mark.exhaustive)
        for i, family in enumerate(FAMILIES)
        for j, n in enumerate((2, 4, 8))
        for k, seed in enumerate((1, 3))
    ],
)
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(
    heads: str, share: bool, n: int, seed: int
) -> None:
    model = random_model(heads, n, share, seed)
    for prompt in ([seed], [1, 2, 3], [4, 4, 4, 4, 2]):
        plain = generate(model, [prompt], 25)
        speculative = generate(model, [prompt], 25, speculative=True)
        assert speculative.tokens == plain.tokens
        assert speculative.stats.forwards <= plain.stats.forwards == 25


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_rows_of_a_batch_do_not_know_of_one_another(
    heads: str, share: bool, speculative: bool
) -> None:
    model = random_model(heads, 4, share)
    alone = [generate(model, [p], 25, eos_id=7).tokens[0] for p in PROMPTS]
    together = generate(model, PROMPTS, 25, eos_id=7, speculative=speculative)
    assert together.tokens == alone
    assert together.stats.tokens == sum(map(len, alone))


CHANGING = [3, 1, 0, 2, 0, 0, 1, 3, 2, 2]
COUNTS = [([1], [PROMPT]), ([2], [[2]]), ([3], PROMPTS), (CHANGING, PROMPTS)]


@pytest.mark.parametrize(
    ("counts", "prompts"),
    COUNTS
    + [
        pytest.param(counts, prompts, marks=pytest.mark.exhaustive)
        for counts in ([1], [2], [3], CHANGING)
        for prompts in ([PROMPT], [[2]], PROMPTS)
        if (counts, prompts) not in COUNTS
    ],
)
@pytest.mark.parametrize(("heads", "share"), [*FAMILIES, RAW])
def test_drafts_are_those_of_a_full_forward_over_the_text_and_the_drafts_before(
    heads: str, share: bool, counts: list[int], prompts: list[list[int]]
) -> None:
    n, size, most = 4, 30, max(counts)
    model = random_model(heads, n, share, vocab=10)
    decoder = Decoder(model, prompts, size, most, Sampler())
    rows = Rows(len(prompts), size, None, most)
    rows.start(decoder.prefill())
    seen = set()
    for num_draft in itertools.cycle(counts):
        if rows.left() <= most:
            break
        plan = decoder.plan(num_draft)
        decoder.predict(plan)
        for row, (prompt, p) in enumerate(zip(prompts, decoder.last, strict=True)):
            if len(rows.tokens[row]) == size:  # finished: what it drafts is of no account
                continue
            known = decoder.tokens[row, : p + 2].tolist()  # t[0] .. t[p+1]
            drafts = decoder.tokens[row, p + 2 : p + 2 + num_draft].tolist()
            assert known == [*prompt, *rows.tokens[row]]
            future = [*known, *drafts, 0, 0][: p + n]  # so that p is the last position
            logits = head_logits(model, future, n)[1 : 1 + num_draft, p]
            assert drafts == logits.argmax(-1).tolist()
        # In place of head 1, a hand that accepts 0, 1, .. drafts in turn.
        before = decoder.last
        fed, target = decoder.verify(plan, None).tolist()
        for row, p in enumerate(before):
            right = (rows.stats.forwards + row) % (num_draft + 1)
            target[row] = [*fed[row][1:], 5]
            target[row][right] = (target[row][right] + 1) % 10
            decoder.tokens[row, p + 2 : p + 3 + num_draft] = torch.tensor(target[row])
        grown = rows.accept(fed, target)
        decoder.accept(grown)
        seen.update(grown)
    assert seen >= set(range(1, most + 2))


def naive_steps(
    heads: str, following: list[int], drafts: list[list[int]], token: int, count: int
) -> dict[str, Any]:
    """Blockwise parallel decoding over the maps of `scripted_model`, by hand."""
    n = len(drafts) + 1
    text = [following[token]]
    checked, right, forwards, log = [0] * (n - 1), [0] * (n - 1), 1, []
    before = token  # the token at position p; text[-1] is t[p+1]
    while len(text) < count:
        proposed: list[int] = []
        for k in range(2, min(n, count - len(text)) + 1):
            source = before if heads == "parallel" else [text[-1], *proposed][-1]
            proposed.append(drafts[k - 2][source])
        forwards += 1
        log.append((len(text), proposed))
        last, new = text[-1], []
        for j, draft in enumerate(proposed):
            checked[j] += 1
            new.append(following[last])
            if draft != new[-1]:
                break
            right[j] += 1
            last = draft
        else:
            new.append(following[last])
        text += new
        before = text[-2]
    pairs = [
        [(d[j], text[at + j]) for at, d in log if j < len(d) and at + j < len(text)]
        for j in range(n - 1)
    ]
    return {
        "tokens": text,
        "forwards": forwards,
        "checked": checked,
        "right": right,
        "drafted": [len(p) for p in pairs],
        "agreed": [sum(a == b for a, b in p) for p in pairs],
    }


CYCLE = [1, 2, 3, 4, 5, 6, 0]
THREE = [1, 2, 0]
SCRIPTS: dict[str, tuple[list[int], list[list[int]], list[list[int]]]] = {
    # following, drafts of parallel heads (from t[p]), drafts of sequential heads (from the last)
    "all right": (
        CYCLE,
        [[(t + k) % 7 for t in range(7)] for k in (2, 3, 4)],
        [CYCLE, CYCLE, CYCLE],
    ),
    "none right": (
        CYCLE,
        [[(t + k + 1) % 7 for t in range(7)] for k in (2, 3, 4)],
        [[(t + 2) % 7 for t in range(7)]] * 3,
    ),
    "half right": (THREE, [[2, 1, 0]], [[2, 2, 1]]),
    "mixed": (
        CYCLE,
        [[2, 3, 4, 5, 6, 1, 1], [3, 4, 0, 6, 0, 1, 2], [4, 0, 6, 0, 1, 2, 3]],
        [[1, 2, 3, 4, 5, 6, 3], [1, 2, 3, 0, 5, 6, 0], [1, 2, 3, 4, 0, 6, 0]],
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_counts_of_a_known_text(heads: str, script: str) -> None:
    following, parallel, sequential = SCRIPTS[script]
    drafts = parallel if heads == "parallel" else sequential
    model = scripted_model(heads, following, drafts)
    sizes = count_calls(model.layers["0"])
    generation = generate(model, [[0]], 61, speculative=True)
    stats = generation.stats
    expected = naive_steps(heads, following, drafts, 0, 61)
    assert generation.tokens == generate(model, [[0]], 61).tokens == [expected["tokens"]]
    for name in ("forwards", "checked", "right", "drafted", "agreed"):
        assert getattr(stats, name) == expected[name], name
    assert len(sizes) - 61 == stats.forwards == stats.steps + 1  # 61 of plain decoding
    assert stats.tokens == 61


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_acceptance_of_all_none_and_half(heads: str) -> None:
    rates = {}
    for script in ("all right", "none right", "half right"):
        following, parallel, sequential = SCRIPTS[script]
        model = scripted_model(heads, following, parallel if heads == "parallel" else sequential)
        rates[script] = generate(model, [[0]], 61, speculative=True).stats
    assert rates["all right"].conditional == rates["all right"].marginal == [1, 1, 1]
    assert rates["all right"].tokens_per_step == 4
    assert rates["none right"].conditional[0] == 0 and rates["none right"].marginal == [0, 0, 0]
    assert rates["none right"].tokens_per_step == 1
    assert rates["half right"].conditional == pytest.approx([0.5], abs=0.02)
    assert rates["half right"].tokens_per_step == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("count", range(1, 10))
def test_the_number_of_tokens_is_exact(count: int, speculative: bool) -> None:
    model = scripted_model("parallel", *SCRIPTS["all right"][:2])
    sizes = count_calls(model.layers["0"])
    generation = generate(model, [[2], [2, 3]], count, speculative=speculative)
    assert [len(row) for row in generation.tokens] == [count, count]
    # Nothing is verified that could not be used: the prompt, then all new tokens but the last.
    assert sum(sizes) == 2 + count - 1


@pytest.mark.parametrize("speculative", [False, True])
def test_a_row_ends_with_eos_also_inside_a_step(speculative: bool) -> None:
    model = scripted_model("parallel", *SCRIPTS["all right"][:2])
    for eos in range(7):
        generation = generate(model, [[0]], 20, eos_id=eos, speculative=speculative)
        assert generation.tokens == [[*range(1, 7), 0][: eos or 7]]
    rows = generate(model, [[0], [4]], 20, eos_id=6, speculative=speculative)
    assert rows.tokens == [[1, 2, 3, 4, 5, 6], [5, 6]]
    assert rows.stats.tokens == 8
    # Of several, whichever comes first.
    rows = generate(model, [[0], [4]], 20, eos_id=(6, 3), speculative=speculative)
    assert rows.tokens == [[1, 2, 3], [5, 6]]


def test_parallel_heads_run_over_accepted_positions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("parallel", 4)
    sizes: list[list[int]] = []

    def counted(blocks: list[torch.nn.Module]) -> torch.nn.Module:
        block = stack(blocks)
        sizes.append(count_calls(block))
        return block

    monkeypatch.setattr(drafting, "stack", counted)
    stats = generate(model, [[1, 2, 3]], 40, speculative=True).stats
    # The prompt and every new token but those of the last step, after which nobody drafts.
    assert 3 + 40 - 1 - 4 <= sum(sizes[0]) <= 3 + 40 - 1
    assert 1 < len(sizes[0]) <= stats.forwards


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_heads_that_have_learned_a_text_draft_nearly_all_of_it(heads: str) -> None:
    model = random_model(heads, 4, vocab=8, dtype=torch.float32).requires_grad_(True)
    line = [1, 2, 3, 1, 4, 2, 5, 6]
    text = torch.tensor([line * 6])
    window = Window(text, torch.zeros_like(text))
    batch = make_batch(window, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scales = torch.full((4,), 1 / batch.labels[..., 0].numel())
    for _ in range(40):
        head_by_head(model, batch, scales, LossOptions())
        optimizer.step()
        optimizer.zero_grad()
    speculative = generate(model, [line], 40, speculative=True)
    assert speculative.tokens == generate(model, [line], 40).tokens == [line * 5]
    assert speculative.stats.tokens_per_step > 3.5


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_single_precision_gives_the_same_text(heads: str) -> None:
    model = random_model(heads, 4, dtype=torch.float32)
    speculative = generate(model, PROMPTS[:1], 40, speculative=True)
    assert speculative.tokens == generate(model, PROMPTS[:1], 40).tokens


@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_an_adapted_number_of_drafts_changes_no_token(heads: str, share: bool) -> None:
    model = random_model(heads, 4, share)
    adapted = generate(model, PROMPTS, 40, speculative=True, num_draft="auto")
    assert adapted.tokens == generate(model, PROMPTS, 40).tokens
    checked = adapted.stats.checked
    assert 0 < checked[0] < adapted.stats.steps  # random heads: at times not worth a draft


@pytest.mark.parametrize(
    ("heads", "prompts"),
    [
        ("parallel", PROMPTS[:1]),
        ("sequential", PROMPTS),
        pytest.param("parallel", PROMPTS, marks=pytest.mark.exhaustive),
        pytest.param("sequential", PROMPTS[:1], marks=pytest.mark.exhaustive),
    ],
)
def test_a_compiled_step_gives_the_same_tokens_from_one_graph(
    heads: str, prompts: list[list[int]], graphs: list[torch.fx.GraphModule]
) -> None:
    model = random_model(heads, 4)
    for texts, size in ((prompts, 40), ([[7, *p] for p in prompts], 43)):
        eager = generate(model, texts, size, speculative=True)
        assert generate(model, texts, size, speculative=True, compile=True).tokens == eager.tokens
    assert len(graphs) == 1  # drafts and their verification together


@pytest.mark.parametrize(
    "heads", ["parallel", pytest.param("sequential", marks=pytest.mark.exhaustive)]
)
def test_a_compiled_step_draws_the_same_samples(
    heads: str, graphs: list[torch.fx.GraphModule]
) -> None:
    model, options = random_model(heads, 3), {"temperature": 0.8, "seed": 3, "speculative": True}
    eager = generate(model, PROMPTS, 30, **options)
    compiled = generate(model, PROMPTS, 30, compile=True, **options)
    # The last step of the first takes less noise: it drafts no more than is wanted.
    assert [row[:25] for row in compiled.tokens] == [row[:25] for row in eager.tokens]
    assert len(graphs) == 1


def test_adapted_drafts_compile_at_most_a_graph_for_each_number(
    graphs: list[torch.fx.GraphModule],
) -> None:
    model = random_model("sequential", 3)
    adapted = generate(model, PROMPTS, 60, speculative=True, num_draft="auto", compile=True)
    assert adapted.tokens == generate(model, PROMPTS, 60).tokens
    assert 1 <= len(graphs) <= 3  # of 0, 1 and 2 drafts; catching up is not compiled


def test_generation_goes_beyond_the_length_of_training() -> None:
    model = random_model(n=2, max_seq_len=8)
    assert len(generate(model, [PROMPT], 20).tokens[0]) == 20


@pytest.mark.parametrize(
    ("prompts", "count", "options", "message"),
    [
        ([[]], 5, {}, "prompt is empty"),
        ([[1], []], 5, {}, "prompt is empty"),
        ([], 5, {}, "prompt is empty"),
        ([[1]], 0, {}, "max_new_tokens = 0"),
        ([[11]], 5, {}, "token 11.*0 to 10"),
        ([[1], [2, -1]], 5, {}, "token -1.*0 to 10"),
        ([[1]], 5, {"speculative": True, "num_draft": 4}, "num_draft = 4.*1 to 3"),
        ([[1]], 5, {"speculative": True, "num_draft": 0}, "num_draft = 0"),
        ([[1]], 5, {"temperature": -1.0}, "temperature"),
        ([[1]], 5, {"top_k": 0}, "top_k"),
        ([[1]], 5, {"top_p": 0.0}, "top_p"),
    ],
)
def test_errors_name_what_is_wrong(
    prompts: list[list[int]], count: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(random_model(), prompts, count, **options)


@pytest.mark.parametrize("token", [-1, 11])
def test_logits_of_an_id_that_is_none(token: int) -> None:
    with pytest.raises(UserError, match=f"token {token}.*0 to 10"):
        next_logits(random_model(), [1, token])


def test_drafting_needs_heads() -> None:
    model = random_model(n=1)
    with pytest.raises(UserError, match=r"heads 2\.\.n"):
        generate(model, [[1]], 5, speculative=True)


def test_the_batch_helper_is_the_teacher_forced_one() -> None:
    batch = batch_of([5, 6, 7, 8, 9], 3)
    assert batch.tokens.tolist() == [[5, 6, 7]]
    assert batch.future_tokens.tolist() == [[[6, 7], [7, 8], [8, 9]]]
