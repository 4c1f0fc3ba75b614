"""Conversations: which tokens a chat template makes of them, and which of these are targets."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_hub import FakeIterableDataset
from loader_sources import rows
from test_special_tokens import LLAMA3, ranks_of
from torch.nn.functional import cross_entropy

from tests.small import small_model
from tests.small_tokenizers import byte_level, sentencepiece
from torchtitan_mtp.config import MTP
from torchtitan_mtp.data import corpus
from torchtitan_mtp.data.chat import encode_conversation
from torchtitan_mtp.data.corpus import encode_document
from torchtitan_mtp.data.document import Document, to_document
from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.mixture import Mixture
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.targets import IGNORE, PADDING, Window, make_batch
from torchtitan_mtp.data.tokenizer import LLAMA3_PATTERN, TiktokenTokenizer, build_tokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.held_out import WHOLE, Text

X = IGNORE
# Each message is <|im_start|>, the first letter of its role, its text, <|im_end|>.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
BEGIN, END = 262, 263  # of the tokenizer; "!" is 0, so "a" is 64, "s" 82, "u" 84
THE, CAT = 257, 260
TURNS = [
    {"role": "system", "content": "b"},
    {"role": "user", "content": "the"},
    {"role": "assistant", "content": "cat"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": ""},
]
IDS = [
    *(BEGIN, 82, 65, END),
    *(BEGIN, 84, THE, END),
    *(BEGIN, 64, CAT, END),
    *(BEGIN, 84, 66, END),
    *(BEGIN, 64, END),
]
# The answers are IDS[10:12] and IDS[18:]. [position, head], by hand.
LABELS = [
    *([X, X, X] for _ in range(7)),
    [X, X, CAT],
    [X, CAT, END],
    [CAT, END, X],
    [END, X, X],
    *([X, X, X] for _ in range(4)),
    [X, X, END],
    [X, END, X],
    [END, X, X],
    [X, X, X],
]


def folder_of(folder, template=PLAIN, tokens=None, **config):
    tokens = tokens or byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tokenizer_of(folder, template=PLAIN, tokens=None, **config):
    return build_tokenizer(str(folder_of(folder, template, tokens, **config)))


def encode(tokenizer, messages, tools=None):
    """Ids, and which of them are targets."""
    document = to_document({"messages": messages, "tools": tools}, "text")
    ids, is_target = encode_conversation(tokenizer, document.conversation)
    return ids.tolist(), is_target.tolist()


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return build_source("files", str(path))


def one_pass(source, tokenizer, seq_len, n):
    return DataLoader(source, tokenizer, seq_len, n, 1, split="all", infinite=False)


def endless(source, tokenizer, seq_len=8, n=3, rank=0, world=1):
    return DataLoader(source, tokenizer, seq_len, n, 1, rank, world, split="all", prefetch=0)


def conversations(count):
    """With answers of 0 to 34 letters, up to three in each."""
    for i in range(count):
        turns = []
        for k in range(1 + i % 3):
            turns.append({"role": "user", "content": "q" * (1 + 5 * i % 13)})
            turns.append({"role": "assistant", "content": "vwxyz"[k] * (7 * i % 35)})
        yield {"messages": turns}


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_targets_of_every_head_by_hand(tmp_path, template):
    tokenizer = tokenizer_of(tmp_path / "tokenizer", template)
    source = write(tmp_path / "a.jsonl", [{"messages": TURNS}])
    (window,) = one_pass(source, tokenizer, len(IDS), 3)
    assert window.tokens[0, : len(IDS)].tolist() == IDS
    assert window.doc_ids[0].tolist() == [0] * len(IDS) + [PADDING] * 3
    assert make_batch(window, 3).labels[0].tolist() == LABELS


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_a_conversation_goes_on_in_the_next_window(tmp_path, template):
    tokenizer = tokenizer_of(tmp_path / "tokenizer", template)
    source = write(tmp_path / "a.jsonl", [{"messages": TURNS}])
    labels = [make_batch(w, 3).labels[0] for w in one_pass(source, tokenizer, 4, 3)]
    assert torch.cat(labels)[: len(IDS)].tolist() == LABELS


def test_no_target_lies_in_another_conversation(tmp_path):
    """[... a cat END] [BEGIN a END]: the second's answer is no target of the first's tokens."""
    tokenizer = tokenizer_of(tmp_path / "tokenizer", MARKED)
    records = [{"messages": TURNS[1:3]}, {"messages": TURNS[4:]}]
    (window,) = one_pass(write(tmp_path / "a.jsonl", records), tokenizer, 11, 3)
    assert window.tokens[0, :11].tolist() == [*IDS[4:12], BEGIN, 64, END]
    expected = [[X, X, X], [X, X, X], [X, X, X], [X, X, CAT], [X, CAT, END], [CAT, END, X]]
    expected += [[END, X, X], [X, X, X], [X, END, X], [END, X, X], [X, X, X]]
    assert make_batch(window, 3).labels[0].tolist() == expected


def test_what_follows_the_end_of_an_answer_is_no_target(tmp_path):
    lines = PLAIN.replace("<|im_end|>", "<|im_end|>\n")
    tokenizer = tokenizer_of(tmp_path / "a", lines)
    ids, is_target = encode(tokenizer, TURNS[:3])
    newline = tokenizer.encode("\n").item()
    assert ids[-3:] == [CAT, END, newline] and is_target == [False] * (len(ids) - 3) + [
        True,
        True,
        False,
    ]
    # Without a token that ends decoding, the line's end is what ends an answer.
    tokenizer = tokenizer_of(tmp_path / "b", lines, eos_token="<|endoftext|>")
    assert encode(tokenizer, TURNS[:3])[1] == [False] * (len(ids) - 3) + [True] * 3


PROMPTED = [
    # a record of lists of messages; its ids are those of its messages, with these targets
    ({"prompt": TURNS[:2], "completion": TURNS[2:3]}, IDS[:12], [10, 11]),
    ({"prompt": TURNS[:4], "completion": TURNS[4:]}, IDS, [18]),  # an earlier answer is read only
    ({"prompt": TURNS[:2], "completion": TURNS[2:]}, IDS, [10, 11, 18]),
    ({"prompt": [], "completion": TURNS}, IDS, [10, 11, 18]),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_answers_in_a_prompt_are_no_targets(tmp_path, template, kind):
    import datasets

    tokenizer = tokenizer_of(tmp_path / "tokenizer", template)
    records = [record for record, _, _ in PROMPTED]
    source = write(tmp_path / "a.jsonl", records)
    if kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
        source = build_source("files", str(tmp_path / "a.parquet"))
    if kind == "hub":
        stream = datasets.Dataset.from_list(records).to_iterable_dataset()
        source = StreamSource("org/name", dataset=stream)
    assert source.has_conversations
    read = [x for _, x, _ in source.read()] if kind == "hub" else [source[i] for i in range(4)]
    for document, (_, ids, targets) in zip(read, PROMPTED, strict=True):
        found = encode_document(tokenizer, document, str)
        assert found.tokens.tolist() == ids
        assert found.is_target.nonzero()[0].tolist() == targets


SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"a": "number"}}}]
WITH_TOOLS = [
    {"role": "system", "content": "be the  naïve cat"},
    {"role": "user", "content": " the 🙂 ca\n"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "sum", "arguments": {"a": 1}}]},
    {"role": "tool", "name": "sum", "content": "1"},
    {"role": "assistant", "content": "🙂 the is 🙂 1 "},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": ""},
]
CHATML = (
    "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZERS = {
    "byte-level": byte_level(*SPECIALS),
    "sentencepiece": sentencepiece(*SPECIALS),
    "metaspace": sentencepiece(*SPECIALS, like="metaspace"),
    "gemma": sentencepiece(*SPECIALS, like="gemma"),
    "ranks": byte_level(*LLAMA3, "<|im_start|>", "<|im_end|>", pattern=LLAMA3_PATTERN),
}


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_targets_are_those_of_transformers(tmp_path, name, is_marked):
    from transformers import AutoTokenizer

    folder = folder_of(tmp_path / "marked", CHATML, TOKENIZERS[name])
    theirs = AutoTokenizer.from_pretrained(folder)
    options = {"tools": TOOLS, "return_dict": True, "return_assistant_tokens_mask": True}
    expected = theirs.apply_chat_template(WITH_TOOLS, **options)
    assert sum(expected["assistant_masks"]) > 10
    if not is_marked:
        template = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        folder = folder_of(tmp_path / "plain", template, TOKENIZERS[name])
    if name == "ranks":
        (folder / "original").mkdir()
        (folder / "original" / "tokenizer.model").write_bytes(ranks_of(TOKENIZERS[name]))
    ours = build_tokenizer(str(folder))
    assert isinstance(ours, TiktokenTokenizer) == (name == "ranks")
    ids, is_target = encode(ours, WITH_TOOLS, TOOLS)
    assert ids == expected["input_ids"]
    assert is_target == list(map(bool, expected["assistant_masks"]))


def test_every_byte_of_an_answers_last_character_is_a_target(tmp_path):
    template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    tokenizer = tokenizer_of(tmp_path, template)
    ids, is_target = encode(tokenizer, [TURNS[1], {"role": "assistant", "content": "🙂"}])
    assert [i for i, said in zip(ids, is_target, strict=True) if said] == ids[-5:-1]
    assert tokenizer.decode(ids[-5:-1]) == "🙂"


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_packed_conversations_are_as_each_apart(tmp_path, template):
    """Labels, and the losses of three heads of a model whose attention stays in a document."""
    tokenizer, n = tokenizer_of(tmp_path / "tokenizer", template), 3
    records = list(conversations(6))
    source = write(tmp_path / "a.jsonl", records)
    sizes = {"vocab_size": 264, "max_seq_len": 400, "attn_mask_type": "block_causal"}
    model = small_model(MTP(num_future_tokens=n), **sizes)

    def losses(window):
        batch = make_batch(window, n)
        with torch.no_grad():
            logits = [model.output(hidden) for hidden in model(batch)]
        sums = [
            cross_entropy(x[0], batch.labels[0, :, k], ignore_index=X, reduction="sum")
            for k, x in enumerate(logits)
        ]
        return batch.labels[0], torch.stack(sums)

    (packed,) = one_pass(source, tokenizer, 400, n)
    length = int((packed.doc_ids != PADDING).sum())
    labels, sums = losses(packed)
    apart = []
    for record in records:
        document = encode_document(tokenizer, source[len(apart)], str)
        assert document.tokens.tolist() == encode(tokenizer, record["messages"])[0]
        tokens, is_target = (
            torch.nn.functional.pad(torch.from_numpy(x)[None], (0, n))
            for x in (document.tokens.astype("int64"), document.is_target)
        )
        doc_ids = torch.zeros_like(tokens)
        doc_ids[0, -n:] = PADDING
        apart.append(losses(Window(tokens, doc_ids, is_target)))
    assert labels[:length].tolist() == torch.cat([x for x, _ in apart]).tolist()
    assert (sums > 100).all()
    torch.testing.assert_close(sums, sum(x for _, x in apart), rtol=1e-5, atol=1e-5)


def hub_of(records):
    features = {"messages": None, "prompt": None}
    return StreamSource("org/name", dataset=FakeIterableDataset([records], features))


def test_a_stream_has_conversations_by_its_columns():
    import datasets

    def columns(text_field="text", **columns):
        stream = datasets.Dataset.from_dict(columns).to_iterable_dataset()
        return StreamSource("org/name", text_field, dataset=stream).has_conversations

    assert columns(messages=[TURNS], prompt=["x"])
    assert columns("chat", chat=[TURNS])
    assert not columns(text=["x"]) and not columns(messages=[TURNS], text=["x"])
    assert not columns(prompt=["x"], completion=["y"])


@pytest.mark.parametrize("record", [{"messages": TURNS}, {"text": "x"}], ids=["talk", "text"])
def test_a_stream_without_columns_has_conversations_by_its_first_document(record):
    import datasets

    stream = datasets.IterableDataset.from_generator(lambda: iter([record, record]))
    assert stream.features is None
    source = StreamSource("org/name", dataset=stream)
    assert source.has_conversations == ("messages" in record)
    assert len(list(source.read())) == 2  # from the first one on


@pytest.mark.parametrize("kind", ["files", "hub", "mixture"])
def test_resuming_within_a_conversation(tmp_path, kind):
    tokenizer = tokenizer_of(tmp_path / "tokenizer")
    records = [r for r in conversations(40) if len(str(r)) > 200]
    made = write(tmp_path / "a.jsonl", records)
    if kind == "hub":
        made = hub_of(records)
    if kind == "mixture":
        texts = write(tmp_path / "b.jsonl", [{"text": "z" * i} for i in range(40)])
        made = Mixture([made, texts], [0.75, 0.25])
    whole = endless(made, tokenizer)
    expected, states = [], []
    for _ in range(60):
        states.append(whole.state_dict())
        expected += rows(whole.next_window())
    assert any(not all(mask) for _, _, mask in expected) and any(any(m) for _, _, m in expected)
    offsets = [x["offset"] for state in states for lane in state["lanes"].values() for x in lane]
    assert max(offsets) > 0  # within a conversation
    for at in (1, 17, 40):
        again = endless(made, tokenizer)
        again.load_state_dict(json.loads(json.dumps(states[at])))
        found = [row for _ in range(60 - at) for row in rows(again.next_window())]
        assert found == expected[at:]


def test_a_mixture_reads_conversations_and_texts_as_each_alone(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "tokenizer")
    parts = [
        write(tmp_path / "a.jsonl", conversations(40)),
        write(tmp_path / "b.jsonl", [{"text": "z" * i} for i in range(1, 60)]),
    ]
    mixed = endless(Mixture(parts, [0.5, 0.5]), tokenizer)
    lanes = mixed.state_dict()["num_lanes"]
    alone = [endless(part, tokenizer) for part in parts]
    queues = [
        [[rows(made.next_window()) for _ in range(lanes)] for _ in range(8)] for made in alone
    ]
    turns = dict.fromkeys(itertools.product(range(2), range(lanes)), 0)
    for g in range(8 * lanes):
        window = mixed.next_window()
        source = int((window.tokens == 89).any())  # "z"
        assert rows(window) == queues[source][turns[source, g % lanes]][g % lanes]
        turns[source, g % lanes] += 1
        assert source == 0 or window.loss_mask is None  # every token of a text is a target


def test_texts_beside_conversations_in_one_file(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "tokenizer")
    records = [{"text": "cat", "messages": 3}, {"messages": TURNS, "prompt": "x", "text_": "y"}]
    source = write(tmp_path / "a.jsonl", records)
    assert source[0] == Document("cat") and source[1].text == ""
    encoded = [encode_document(tokenizer, source[i], str).tokens.tolist() for i in range(2)]
    assert encoded == [[CAT, END], IDS]
    named = write(tmp_path / "b.jsonl", [{"text": "cat", "messages": TURNS}])
    path = str(tmp_path / "b.jsonl")
    assert not named.has_conversations
    assert build_source("files", path, text_field="messages").has_conversations


def test_parquet_and_lines_give_the_same(tmp_path):
    """Columns have null where a message lacks a key, and tools as JSON."""
    import pyarrow
    import pyarrow.parquet

    tokenizer = tokenizer_of(tmp_path / "tokenizer", CHATML)
    records = [{"messages": WITH_TOOLS, "tools": TOOLS}, {"messages": TURNS, "tools": None}]
    lines = write(tmp_path / "a.jsonl", records)
    columns = {"id": [1, 2], "messages": [r["messages"] for r in records]}
    columns["tools"] = [json.dumps(TOOLS), None]
    table = pyarrow.table(columns)
    assert table["messages"][1][0].as_py()["tool_calls"] is None
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    columns = build_source("files", str(tmp_path / "a.parquet"))
    assert columns.has_conversations
    for i, record in enumerate(records):
        ids = encode(tokenizer, record["messages"], record["tools"])[0]
        for source in (lines, columns):
            assert encode_document(tokenizer, source[i], str).tokens.tolist() == ids
    assert lines.sizes().tolist() == columns.sizes().tolist()


def test_threads_do_not_mix_their_texts_up(tmp_path):
    tokenizer = tokenizer_of(tmp_path, MARKED)

    def both(i):
        messages = [TURNS[1], {"role": "assistant", "content": "cat" * (i % 7)}]
        return encode(tokenizer, messages), tokenizer.encode("<|im_end|>").tolist()

    expected = [both(i) for i in range(200)]
    assert len(expected[0][1]) == 10  # of a text the letters
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(both, range(200))) == expected


def test_prompts_of_an_evaluation_are_pieces_of_conversations(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": TURNS}])
    prompts = Text(source, WHOLE, "").prompts(tokenizer_of(tmp_path / "tokenizer"), 1, 99)
    assert prompts == [IDS]


@pytest.mark.parametrize("kind", ["files", "stream without columns"])
def test_another_template_is_other_data(tmp_path, kind):
    source = write(tmp_path / "a.jsonl", conversations(9))
    if kind != "files":
        records = [{"text": None}, *conversations(9)]  # the first of which is a bad one
        source = StreamSource("org/name", dataset=FakeIterableDataset([records]))
    first = endless(source, tokenizer_of(tmp_path / "a"))
    state = first.state_dict()
    endless(source, tokenizer_of(tmp_path / "elsewhere")).load_state_dict(state)
    other = endless(source, tokenizer_of(tmp_path / "b", PLAIN + "\n"))
    message = r"has chat_template '\w+', this run has .* put back the chat template of model\.hf_"
    with pytest.raises(UserError, match=message):
        other.load_state_dict(state)
    # Of texts it is not asked for, and a state from before there were conversations has none.
    texts = write(tmp_path / "b.jsonl", [{"text": "cat" * 9}])
    state = endless(texts, tokenizer_of(tmp_path / "none", None)).state_dict()
    del state["chat_template"]
    endless(texts, tokenizer_of(tmp_path / "none", None)).load_state_dict(state)


LIST = "expected 'messages' to be a list of objects with 'role' and 'content'; found "
BAD = {
    "neither": ({"body": "x"}, "expected an object with a string 'text', .* or 'messages'; found"),
    "no list": ({"messages": "x"}, f"{LIST}x"),
    "null": ({"messages": None}, f"{LIST}None"),
    "empty": ({"messages": []}, f"{LIST}no answer of an 'assistant'"),
    "no answer": ({"messages": TURNS[:2]}, f"{LIST}no answer of an 'assistant'"),
    "no object": ({"messages": ["x", *TURNS]}, rf"{LIST}\['x', "),
    "no role": ({"messages": [{"from": "human", "value": "x"}]}, rf"{LIST}\[{{'from'"),
    "no answer to a prompt": (
        {"prompt": TURNS[:3], "completion": TURNS[3:4]},
        "expected 'prompt and completion' to be a list of .* no answer of an 'assistant'",
    ),
    "a prompt that is text": (
        {"prompt": "x", "completion": TURNS},
        "strings 'prompt' and 'completion', or 'messages'; found {'prompt': 'str', 'comp",
    ),
    "no content": ({"messages": [{"role": "user"}, *TURNS]}, rf"{LIST}\[{{'role': 'user'}}, "),
}


@pytest.mark.parametrize("name", BAD)
def test_records_that_are_no_conversations(tmp_path, name):
    record, message = BAD[name]
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{message}") as error:
        write(tmp_path / "a.jsonl", [{"messages": TURNS}, record])
    assert "\n" not in str(error.value)
    skipped = build_source("files", str(tmp_path / "a.jsonl"), bad_records="skip")
    assert (skipped.sizes() == -1).tolist() == [False, True]


THINKING = PLAIN.replace("m.content", "m.content.split('/')[0 if loop.last else -1]")
REFUSED = {
    "role": (
        "{% for m in messages %}{{ raise_exception('unknown role ' ~ m.role) }}{% endfor %}",
        r"the chat template refuses the messages: unknown role system",
    ),
    "tools": (PLAIN, "the chat template refuses the messages: .*Tools should .* be a JSON schema"),
    "fails": ("{{ messages[9].content }}", "the chat template refuses the messages: "),
    "rewrites": (THINKING, r"spells message 3 otherwise than .* put \{% generation %\}"),
    "prompt": (
        PLAIN.replace("a{% endif %}", "a!{% endif %}"),
        r"spells message 3 otherwise than .* put \{% generation %\}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_do_not_take_a_conversation(tmp_path, name):
    template, message = REFUSED[name]
    turns = [*TURNS[:2], {"role": "assistant", "content": "the/cat"}, *TURNS[3:]]
    record = {"messages": turns} | ({"tools": "[no JSON"} if name == "tools" else {})
    source = write(tmp_path / "a.jsonl", [record])
    loader = endless(source, tokenizer_of(tmp_path / "tokenizer", template))
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{message}") as error:
        loader.next_window()
    assert "\n" not in str(error.value)


FAILING = PLAIN.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('a word') }}{% endif %}",
)


def talk(answer):
    return {"messages": [TURNS[1], {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("kind", ["counted", "estimated", "stream"])
def test_conversations_that_the_template_refuses_are_skipped_when_asked(
    tmp_path, kind, caplog, monkeypatch
):
    tokenizer = tokenizer_of(tmp_path / "tokenizer", FAILING)
    monkeypatch.setattr(corpus, "ENCODED_BYTES", 0 if kind == "estimated" else 1 << 20)

    def source_of(*answers):
        records = [talk(answer) for answer in answers]
        if kind == "stream":
            shards = FakeIterableDataset([records])
            return StreamSource("org/name", dataset=shards, bad_records="skip")
        write(tmp_path / "a.jsonl", records)
        return build_source("files", str(tmp_path / "a.jsonl"), bad_records="skip")

    mixed = source_of("cat", "bad", "the", "very bad", "")
    windows = list(one_pass(mixed, tokenizer, 8, 1))
    with caplog.at_level("WARNING"):
        loader = endless(mixed, tokenizer)
        for _ in range(40):
            loader.next_window()
    told = [x.getMessage() for x in caplog.records if "bad record" in x.getMessage()]
    where = "org/name: record 1" if kind == "stream" else f"{tmp_path}/a.jsonl:"
    assert any(f"the first: {where}" in x and "refuses the messages: a word" in x for x in told)
    assert any("2 bad record(s) skipped" in x for x in told) == (kind == "counted")
    prompts = Text(mixed, WHOLE, "a text").prompts(tokenizer, 5, 99)
    assert prompts == [encode(tokenizer, talk(x)["messages"])[0] for x in ("cat", "the", "")]
    good = list(one_pass(source_of("cat", "the", ""), tokenizer, 8, 1))
    assert [rows(w) for w in windows] == [rows(w) for w in good]
    with pytest.raises(UserError, match=r"are bad records; mend them|has no documents"):
        endless(source_of("bad", "bad"), tokenizer).next_window()


def test_a_template_that_is_no_jinja_is_no_fault_of_a_record(tmp_path):
    write(tmp_path / "a.jsonl", [talk("cat")])
    source = build_source("files", str(tmp_path / "a.jsonl"), bad_records="skip")
    tokenizer = tokenizer_of(tmp_path / "tokenizer", "{% for m in messages %}{{ m.content }")
    with pytest.raises(
        UserError, match=r"^tokenizer .*: no readable chat template: unexpected '}'"
    ):
        endless(source, tokenizer)


def test_a_conversation_that_the_assistant_begins(tmp_path):
    messages = [{"role": "assistant", "content": "the"}, *TURNS[3:]]
    with pytest.raises(UserError, match=r"no prompt comes before the assistant's first message"):
        encode(tokenizer_of(tmp_path / "plain"), messages)
    marked = encode(tokenizer_of(tmp_path / "marked", MARKED), messages)
    assert marked[0][:4] == [BEGIN, 64, THE, END] and marked[1][:4] == [False, False, True, True]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"tokenizer .*: no chat template to be had"),
        ("{{ strftime_now('%d') }}" + PLAIN, r"the chat template spells today's date"),
    ],
)
def test_tokenizers_that_cannot_spell_conversations(tmp_path, template, message):
    source = write(tmp_path / "a.jsonl", [{"messages": TURNS}])
    with pytest.raises(UserError, match=message) as error:
        endless(source, tokenizer_of(tmp_path / "tokenizer", template))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="tokenizer byte: no chat template"):
        endless(source, build_tokenizer("byte"))
