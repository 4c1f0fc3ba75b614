"""The harness's three questions, answered as by hand: one token, one forward at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_models import head_logits, random_model

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.tokenizer import ByteTokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.lm_eval_adapter import HarnessModel, cut
from torchtitan_mtp.models.transformer import Transformer

N = 3
BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


def harness(model: Transformer, seq_len: int = 64, **options: Any) -> HarnessModel:
    config = JobConfig()
    config.training.seq_len = seq_len
    config.loss.softcap = 3.0
    return HarnessModel(model, ByteTokenizer(), config, **options)


@pytest.fixture(scope="module", params=["parallel", "sequential"])
def model(request: pytest.FixtureRequest) -> Iterator[Transformer]:
    model = random_model(request.param, N, vocab=259)
    model.output.weight[128:] = 0  # it writes single characters
    yield model


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


def naive(model: Transformer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether greedy decoding writes it."""
    total, greedy, text = 0.0, True, list(context)
    for token in continuation:
        logits = head_logits(model, text + [0] * (N - 1), N)[0, -1]
        total += (3.0 * torch.tanh(logits / 3.0)).log_softmax(-1)[token].item()
        greedy = greedy and int(logits.argmax()) == token
        text.append(token)
    return total, greedy


def greedy_text(model: Transformer, context: str, count: int) -> bytes:
    text = [BOS, *context.encode()]
    for _ in range(count):
        text.append(int(head_logits(model, text + [0] * (N - 1), N)[0, -1].argmax()))
    return bytes(t for t in text[1 + len(context.encode()) :] if t < 256)


def test_loglikelihoods(model: Transformer) -> None:
    best = int(head_logits(model, [BOS, *b"ab", 0, 0], N)[0, -1].argmax())
    pairs = [("def", " foo(x)"), ("", "x"), ("a", "é"), ("ab", chr(best)), ("a long one", " b c")]
    lm = harness(model, batch_size=2)
    found = lm.loglikelihood(instances("loglikelihood", *pairs))
    for (context, continuation), (log_prob, greedy) in zip(pairs, found, strict=True):
        expected = naive(model, [BOS, *context.encode()], list(continuation.encode()))
        assert log_prob == pytest.approx(expected[0], rel=1e-4), context
        assert greedy == expected[1]
    assert [greedy for _, greedy in found].count(True) == 1


class WithoutBos(ByteTokenizer):
    """As Qwen's: nothing goes in front."""

    bos_id, prefix = None, ()


def test_a_model_without_bos(model: Transformer) -> None:
    """As the harness's own adapter for transformers has it: no token in front, and eos for an empty
    context."""
    lm = harness(model)
    lm.tok = WithoutBos()
    found = lm.loglikelihood(instances("loglikelihood", ("def", " foo"), ("", "x")))
    contexts = [([*b"def"], b" foo"), ([EOS], b"x")]
    for (context, continuation), (log_prob, _) in zip(contexts, found, strict=True):
        expected = naive(model, context, list(continuation))
        assert log_prob == pytest.approx(expected[0], rel=1e-4), context
    request = instances("generate_until", ("ab", {"max_gen_toks": 40}))
    (text,) = lm.generate_until(request)
    lm.tok.eos_ids = (EOS, ord(text[7]))
    assert lm.generate_until(request) == [text[: text.index(text[7]) + 1]]
    assert lm.generate_until(instances("generate_until", ("", {"max_gen_toks": 1})))


def test_spaces_at_the_end_of_a_context_are_the_continuations(model: Transformer) -> None:
    lm = harness(model)
    (moved,), (plain,) = (
        lm.loglikelihood(instances("loglikelihood", pair)) for pair in [("a ", "b"), ("a", " b")]
    )
    assert moved == plain


def test_long_contexts_lose_their_beginning(model: Transformer) -> None:
    lm = harness(model, seq_len=8)
    (found,) = lm.loglikelihood(instances("loglikelihood", ("0123456789abcdef", "xyz")))
    # Eight inputs: the last six characters of the context, and "xy".
    assert found[0] == pytest.approx(naive(model, list(b"abcdef"), list(b"xyz"))[0], rel=1e-4)
    with pytest.raises(UserError, match="9 tokens, but the model was trained on 8"):
        lm.loglikelihood(instances("loglikelihood", ("a", "123456789")))


def test_whole_documents_in_windows(model: Transformer) -> None:
    """Eight tokens a window: each token once, after as many as a window leaves it."""
    texts, lm = ["short", "twenty characters ..", ""], harness(model, seq_len=8)
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((t,) for t in texts)))
    short, long = list(texts[0].encode()), list(texts[1].encode())
    assert found[0] == pytest.approx(naive(model, [BOS], short)[0], rel=1e-4)
    windows = [([BOS], long[:8]), (long[7:8], long[8:16]), (long[11:16], long[16:])]
    expected = sum(naive(model, *window)[0] for window in windows)
    assert found[1] == pytest.approx(expected, rel=1e-4)
    assert found[2] == 0


def test_generation_stops_at_the_first_stop_string(model: Transformer) -> None:
    whole = greedy_text(model, "ab", 24).decode(errors="replace")
    stop = whole[9:11]
    requests = [
        ("ab", {"until": [stop], "max_gen_toks": 24}),
        ("cd", {"until": [stop], "max_gen_toks": 24}),
        ("ab", {"until": [], "max_gen_toks": 5}),
        ("ab", {"until": whole[3], "max_gen_toks": 24}),
    ]
    lm = harness(model)
    found = lm.generate_until(instances("generate_until", *requests))
    other = greedy_text(model, "cd", 24).decode(errors="replace")
    five = greedy_text(model, "ab", 5).decode(errors="replace")
    assert found == [whole.split(stop)[0], other.split(stop)[0], five, whole.split(whole[3])[0]]


def test_equal_requests_get_samples_of_their_own(model: Transformer) -> None:
    request = ("ab", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5})
    lm = harness(model, batch_size=2)
    found = lm.generate_until(instances("generate_until", *[request] * 8))
    assert len(set(found)) == 8


def test_stop_strings_are_looked_for_between_rounds(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = greedy_text(model, "ab", 20).decode(errors="replace")
    options = {"until": [whole[2]], "max_gen_toks": 20}
    monkeypatch.setattr("torchtitan_mtp.inference.lm_eval_adapter.ROUND", 4)
    (found,) = harness(model).generate_until(instances("generate_until", ("ab", options)))
    assert found == whole.split(whole[2])[0]
    never = {"until": ["never in there"], "max_gen_toks": 20}
    (found,) = harness(model).generate_until(instances("generate_until", ("ab", never)))
    assert found == whole


def test_cut() -> None:
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["", "two"]) == "one"
