"""What comes step by step is what comes at once."""

from __future__ import annotations

from itertools import chain

import pytest
from tiny_models import FAMILIES, random_model

from torchtitan_mtp.data.tokenizer import ByteTokenizer
from torchtitan_mtp.inference import generate
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.inference.streaming import TextStream, stream


@pytest.mark.parametrize("eos_id", [None, 1])
@pytest.mark.parametrize("num_draft", [0, 1, 3])
@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_the_tokens_of_generate(
    heads: str, share: bool, num_draft: int, eos_id: int | None
) -> None:
    model = random_model(heads, 4, share, vocab=3)
    whole = generate(model, [[0, 2]], 20, eos_id=eos_id).tokens[0]
    pieces = list(stream(model, [0, 2], 20, Sampler(), num_draft=num_draft, eos_id=eos_id))
    assert list(chain(*pieces)) == whole
    assert len(pieces[0]) == 1 and all(1 <= len(piece) <= num_draft + 1 for piece in pieces[1:])
    stats = generate(
        model, [[0, 2]], 20, eos_id=eos_id, speculative=num_draft > 0, num_draft=num_draft or None
    ).stats
    assert len(pieces) == 1 + stats.steps


def test_sampled_tokens_depend_on_the_seed() -> None:
    model = random_model(vocab=11)
    for drafts in (0, 3):
        texts = [
            list(chain(*stream(model, [1], 20, Sampler(1.0, seed=seed), num_draft=drafts)))
            for seed in (1, 1, 2)
        ]
        assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 20


def test_a_character_waits_for_its_last_byte() -> None:
    text = TextStream(ByteTokenizer())
    euro = list("€".encode())
    shown = [text.add([97]), text.add(euro[:2]), text.add([euro[2], 98]), text.add([])]
    assert shown == ["a", "", "€b", ""]
    assert text.add(euro[:1]) == "" and text.finish() == "\N{REPLACEMENT CHARACTER}"
