"""Which sizes ranks can share, and what one keeps alive. What they compute: tests/distributed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.allocations import most_alive
from tests.small import ARGS, DEEPSEEK, small_model, small_window
from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.distributed.tensor_parallel import apply_tensor_parallel, check_sizes
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.context_parallel import SequenceRanks
from torchtitan_mtp.models.flavors import flavors
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp import ENGINES, add_heads
from torchtitan_mtp.ops import LossOptions

EXPERTS_ALONE = replace(DEEPSEEK, moe=replace(DEEPSEEK.moe, n_dense_layers=0))
EVEN = replace(ARGS, n_heads=8, n_kv_heads=4, hidden_dim=48, vocab_size=32)


@pytest.mark.parametrize(
    ("args", "degree", "expected"),
    [
        (EVEN, 4, None),
        (replace(DEEPSEEK, vocab_size=32), 4, None),  # its latent vector serves all heads
        (replace(EXPERTS_ALONE, hidden_dim=47, vocab_size=32), 4, None),
        (replace(flavors["llama3"]["70B"], vocab_size=128256), 8, None),
        (EVEN, 8, "= 8: expected a divisor of the model's n_kv_heads, 4; the nearest .* is 4"),
        (EVEN, 3, "= 3: expected a divisor of the model's n_heads, 8; .* is 2"),
        (replace(EVEN, hidden_dim=46), 4, "hidden_dim, 46; .* is 2"),
        (
            replace(EVEN, vocab_size=258),
            4,
            "^model.vocab_size = 258: .*; the next is 260, set it for new weights, or lower the "
            "degree to 2 for stored ones$",
        ),
    ],
)
def test_sizes_that_ranks_share(args, degree, expected):
    if expected is None:
        check_sizes(args, degree)
    else:
        with pytest.raises(UserError, match=expected) as caught:
            check_sizes(args, degree)
        assert f"parallelism.tensor_parallel_degree = {degree}" in str(caught.value)


@pytest.mark.exhaustive
@pytest.mark.parametrize("table", [{}, {"heads": "sequential"}])
def test_two_ranks_keep_half_of_the_activations_each(table):
    """Of 2048 tokens, beside weights and gradients, which are there before. Every layer gathers
    what attention and feed-forward read. The other rank is of torch's fake group."""
    size, n = 2048, 3
    mtp = MTP(num_future_tokens=n, **table)
    args = replace(
        ARGS, dim=256, n_layers=4, max_seq_len=size, vocab_size=30, attn_mask_type="causal"
    )
    batch = make_batch(small_window(1, size + n), n)

    def peak(model: Trunk) -> int:
        scales = torch.full((n,), 1 / size)
        options = LossOptions(chunk_rows=64)
        ENGINES[mtp.engine](model, batch, scales, options, True)
        return most_alive(lambda: ENGINES[mtp.engine](model, batch, scales, options, True))

    alone = peak(small_model(mtp, shape=args))
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        model = add_heads(build_model(args), mtp)
        apply_tensor_parallel(model, mesh, SequenceRanks(mesh.get_group()))
        model.to_empty(device="cpu")
        model.init_weights(0)
        found = peak(model)
    finally:
        dist.destroy_process_group()
    assert found < 0.6 * alone
