"""Which sizes ranks can share. What they compute: tests/distributed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.small import ARGS, DEEPSEEK
from torchtitan_mtp.distributed.tensor_parallel import check_sizes
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.flavors import flavors

EVEN = replace(ARGS, n_heads=8, n_kv_heads=4, hidden_dim=48, vocab_size=32)


@pytest.mark.parametrize(
    ("args", "degree", "expected"),
    [
        (EVEN, 4, None),
        (replace(DEEPSEEK, vocab_size=32), 4, None),  # its latent vector serves all heads
        (replace(flavors["llama3"]["70B"], vocab_size=128256), 8, None),
        (EVEN, 8, "= 8: expected a divisor of the model's n_kv_heads, 4; the nearest .* is 4"),
        (EVEN, 3, "= 3: expected a divisor of the model's n_heads, 8; .* is 2"),
        (replace(EVEN, hidden_dim=46), 4, "hidden_dim, 46; .* is 2"),
        (replace(EVEN, vocab_size=257), 4, "^model.vocab_size = 257: .*; the next is 260, set it"),
    ],
)
def test_sizes_that_ranks_share(args, degree, expected):
    if expected is None:
        check_sizes(args, degree)
    else:
        with pytest.raises(UserError, match=expected) as caught:
            check_sizes(args, degree)
        assert f"parallelism.tensor_parallel_degree = {degree}" in str(caught.value)
