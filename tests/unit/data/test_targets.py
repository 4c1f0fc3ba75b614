import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_mtp.data.targets import IGNORE, PADDING, Window, list_documents, make_batch

X = IGNORE


def window(tokens, doc_ids, mask=None):
    return Window(
        torch.tensor([tokens]),
        torch.tensor([doc_ids]),
        None if mask is None else torch.tensor([mask]),
    )


def test_one_document_by_hand():
    # S = 4, n = 3
    batch = make_batch(window([10, 11, 12, 13, 14, 15, 16], [0] * 7), 3)
    assert batch.tokens.tolist() == [[10, 11, 12, 13]]
    assert batch.labels.tolist() == [[[11, 12, 13], [12, 13, 14], [13, 14, 15], [14, 15, 16]]]
    assert batch.future_tokens.tolist() == [[[11, 12], [12, 13], [13, 14], [14, 15]]]
    assert batch.positions.tolist() == [[0, 1, 2, 3]]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 0]]


def test_documents_shorter_than_the_depth_by_hand():
    # documents of 2, 1 and 4 tokens; S = 4, n = 3
    batch = make_batch(window([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 2, 2, 2, 2]), 3)
    assert batch.labels.tolist() == [[[2, X, X], [X, X, X], [X, X, X], [5, 6, 7]]]
    # inputs of later heads are never masked
    assert batch.future_tokens.tolist() == [[[2, 3], [3, 4], [4, 5], [5, 6]]]
    assert batch.doc_ids.tolist() == [[0, 0, 1, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3]]


def test_targets_that_head_1_has_inside_the_window_by_hand():
    """Head k's at i is head 1's at i + k - 1, which has to be one of the S = 4 positions."""
    batch = make_batch(window([10, 11, 12, 13, 14, 15, 16], [0] * 7), 3, from_head_1=True)
    assert batch.labels.tolist() == [[[11, 12, 13], [12, 13, 14], [13, 14, X], [14, X, X]]]
    batch = make_batch(window([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 2, 2, 2, 2]), 3, from_head_1=True)
    assert batch.labels.tolist() == [[[2, X, X], [X, X, X], [X, X, X], [5, X, X]]]


def test_padding_is_neither_source_nor_target():
    pad = PADDING
    batch = make_batch(window([1, 2, 3, 0, 0, 0], [0, 0, 0, pad, pad, pad]), 2)
    assert batch.labels.tolist() == [[[2, 3], [3, X], [X, X], [X, X]]]


def test_mask_forbids_targets_not_sources():
    mask = [False, False, False, True, True]
    batch = make_batch(window([1, 2, 3, 4, 5], [0] * 5, mask), 2)
    assert batch.labels.tolist() == [[[X, X], [X, 4], [4, 5]]]


def test_plain_next_token_prediction_has_no_future_tokens():
    batch = make_batch(window([1, 2, 3], [0] * 3), 1)
    assert batch.future_tokens.shape == (1, 2, 0)
    assert batch.labels.tolist() == [[[2], [3]]]


@pytest.mark.parametrize("n", [0, 3, 4])
def test_window_must_be_wider_than_n(n):
    with pytest.raises(ValueError, match="window of 3 tokens"):
        make_batch(window([1, 2, 3], [0] * 3), n)


@st.composite
def windows(draw):
    n = draw(st.integers(1, 5))
    width = n + draw(st.integers(1, 12))
    rows = draw(st.integers(1, 3))
    tokens = torch.arange(rows * width).reshape(rows, width)
    docs = []
    for _ in range(rows):
        starts = draw(st.lists(st.booleans(), min_size=width, max_size=width))
        padding = draw(st.integers(0, width))
        doc = torch.tensor(starts).long().cumsum(0)
        docs.append(torch.where(torch.arange(width) < width - padding, doc, PADDING))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    loss_mask = None if mask is None else torch.tensor(mask).reshape(rows, width)
    return Window(tokens, torch.stack(docs), loss_mask), n


@settings(max_examples=200, deadline=None)
@given(windows())
def test_equals_the_definition_at_every_position(drawn):
    (tokens, docs, mask), n = drawn
    batch = make_batch(Window(tokens, docs, mask), n)
    rows, seq_len = tokens.shape[0], tokens.shape[1] - n
    assert batch.labels.shape == (rows, seq_len, n)
    assert batch.future_tokens.shape == (rows, seq_len, n - 1)
    for b in range(rows):
        for i in range(seq_len):
            assert batch.tokens[b, i] == tokens[b, i]
            assert batch.doc_ids[b, i] == docs[b, i]
            for k in range(1, n + 1):
                same = docs[b, i] == docs[b, i + k] and docs[b, i] >= 0
                allowed = mask is None or mask[b, i + k]
                assert batch.labels[b, i, k - 1] == (
                    tokens[b, i + k] if same and allowed else IGNORE
                )
            for k in range(2, n + 1):
                assert batch.future_tokens[b, i, k - 2] == tokens[b, i + k - 1]


def test_documents_lie_one_behind_another():
    doc_ids = torch.tensor([[0, 0, 1, 1, 1], [1, 2, 2, PADDING, PADDING]])
    documents = list_documents(doc_ids)
    assert documents.starts.tolist() == [0, 2, 5, 6, 8, 10]
    assert documents.starts.dtype == torch.int32
    assert documents.longest == 3
    assert list_documents(torch.zeros(1, 4)).starts.tolist() == [0, 4]


def test_a_batch_on_an_accelerator_knows_its_documents():
    window = Window(torch.arange(6).view(1, 6), torch.tensor([[0, 0, 0, 1, 1, 1]]))
    batch = make_batch(window, 2)
    assert batch.to(torch.device("cpu")).documents is None
    moved = batch.to(torch.device("meta"))
    assert all(
        t.is_meta and t.shape == old.shape for t, old in zip(moved[:5], batch[:5], strict=True)
    )
    assert moved.documents.starts.is_meta and moved.documents.starts.shape == (3,)
    assert moved.documents.longest == 3


def test_a_window_is_split_by_sequences():
    tokens = torch.arange(12).view(4, 3)
    first, second = Window(tokens, tokens // 6).split(2)
    assert first.tokens.tolist() == [[0, 1, 2], [3, 4, 5]] and first.loss_mask is None
    assert second.doc_ids.tolist() == [[1, 1, 1], [1, 1, 1]]
    masked = Window(tokens, tokens, tokens > 5).split(4)
    assert [part.loss_mask.any().item() for part in masked] == [False, False, True, True]
