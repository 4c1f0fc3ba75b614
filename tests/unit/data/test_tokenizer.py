import base64
import json

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from torchtitan_mtp.data.tokenizer import (
    LLAMA3_PATTERN,
    ByteTokenizer,
    HFTokenizer,
    TiktokenTokenizer,
    build_tokenizer,
)
from torchtitan_mtp.errors import UserError

TEXT = "def f(x):\n    return 'naïve 漢字 🙂'  # <|end_of_text|>\n"


def rank_lines(tokens):
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


BYTES = [bytes([i]) for i in range(256)]


@pytest.fixture
def ranks_file(tmp_path):
    path = tmp_path / "small.tiktoken"
    path.write_bytes(rank_lines([*BYTES, b"re", b"tu", b"retu", b"rn", b"return", b" return"]))
    return path


@pytest.fixture
def hf_file(tmp_path):
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|done|>"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_byte_ids():
    tokenizer = build_tokenizer("byte")
    ids = tokenizer.encode("aé")
    assert ids.tolist() == [97, 0xC3, 0xA9]
    assert ids.dtype == np.int32
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (259, 256, 257)
    assert tokenizer.decode([256, 97, 257, 258]) == "a"
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"
    assert tokenizer.encode("").tolist() == []


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8", errors="replace"))
    assert tokenizer.decode(ids.tolist()) == text.encode("utf-8", errors="replace").decode()


def test_tiktoken_merges_in_rank_order(ranks_file):
    tokenizer = TiktokenTokenizer(ranks_file)
    assert tokenizer.encode("return").tolist() == [260]
    assert tokenizer.encode("x return").tolist() == [ord("x"), 261]
    assert tokenizer.encode("tur").tolist() == [257, ord("r")]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (264, 262, 263)


@pytest.mark.parametrize("kind", ["ranks_file", "hf_file"])
def test_text_that_spells_a_special_token_is_text(kind, request):
    tokenizer = build_tokenizer(str(request.getfixturevalue(kind)))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids.tolist()) == TEXT
    assert not {*tokenizer.prefix, tokenizer.eos_id} & set(ids.tolist())
    assert ids.dtype == np.int32
    # special ids and those of a padded vocabulary leave nothing
    around = [*tokenizer.prompt(TEXT), tokenizer.eos_id, tokenizer.vocab_size + 7]
    assert tokenizer.decode(around) == TEXT
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("é").tolist()[:1])


def test_llama3_special_tokens(tmp_path):
    # 128,000 ranks: the bytes and made-up tokens of two to four bytes
    tokens = list(BYTES)
    tokens += [bytes([i, j]) for i in range(256) for j in range(256)]
    tokens += [bytes([0, 0, i, j]) for i in range(256) for j in range(256)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(rank_lines(tokens[:128_000]))
    tokenizer = build_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 128_256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128_000, 128_001)
    specials = tokenizer._encoding._special_tokens
    assert specials["<|start_header_id|>"] == 128_006
    assert specials["<|eot_id|>"] == 128_009
    assert specials["<|reserved_special_token_250|>"] == 128_255


def test_a_changed_file_is_read_anew(ranks_file):
    before = TiktokenTokenizer(ranks_file)
    ranks_file.write_bytes(rank_lines([*BYTES, b"et"]))
    after = TiktokenTokenizer(ranks_file)
    assert after.encode("return").tolist() == [ord("r"), 256, ord("u"), ord("r"), ord("n")]
    assert before.fingerprint != after.fingerprint


def test_long_runs_of_one_character(ranks_file):
    tokenizer = TiktokenTokenizer(ranks_file)
    for text in (" " * 300_000, "a" * 300_000, "\n" * 300_000, " " * 100_000 + "x"):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def cut_as_meta_does(text):
    """Meta's llama3/llama/tokenizer.py: Tokenizer.encode and
    _split_whitespaces_or_nonwhitespaces, with its two constants."""
    for start in range(0, len(text), 400_000):
        part = text[start : start + 400_000]
        run, is_space, begin = 0, part[0].isspace(), 0
        for i, char in enumerate(part):
            if is_space ^ char.isspace():
                run, is_space = 1, char.isspace()
            else:
                run += 1
                if run > 25_000:
                    yield part[begin:i]
                    begin, run = i, 1
        yield part[begin:]


@pytest.mark.parametrize(
    "text",
    [
        "x" + " " * 1_000_001 + "y",  # tiktoken panics on it as a whole
        "re" * 30_000 + " return\n" * 20_000 + "\x1c\u2003" * 13_000 + "turn" * 90_000,
        "a" * 399_999 + "  re",
        "a" * 25_000 + " " * 25_000 + "b" * 25_001 + "\n" * 50_001,
        "return",
    ],
)
def test_long_texts_have_the_ids_of_metas_procedure(tmp_path, text):
    tokens = [*BYTES, b"re", b"tu", b"retu", b"rn", b"return", b" return", b"aa", b"  ", b"\n\n"]
    (tmp_path / "x.tiktoken").write_bytes(rank_lines(tokens))
    own = tiktoken.Encoding(
        "x",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={},
    )
    expected = [i for part in cut_as_meta_does(text) for i in own.encode_ordinary(part)]
    assert build_tokenizer(str(tmp_path)).encode(text).tolist() == expected


@pytest.mark.parametrize("before", ["ab " * 133_331, "x" * 24_995])
def test_a_special_token_across_a_cut_is_one(ranks_file, before):
    tokenizer = TiktokenTokenizer(ranks_file)
    ids = tokenizer.encode(f"{before}<|end_of_text|>return", special=True).tolist()
    assert ids == [*before.encode(), tokenizer.eos_id, 260]


def test_of_special_tokens_the_longest_counts(ranks_file):
    tokenizer = TiktokenTokenizer(ranks_file)
    tokenizer.specials = {"<a": 300, "<a>": 301, "<a>b": 302}
    assert tokenizer.encode("<a><a>b<a", special=True).tolist() == [301, 302, 300]


def test_stored_truncation_and_padding_are_not_applied(hf_file):
    before = HFTokenizer(hf_file).fingerprint
    stored = Tokenizer.from_file(str(hf_file))
    stored.enable_truncation(32)
    stored.enable_padding(length=64)
    stored.save(str(hf_file))
    tokenizer = HFTokenizer(hf_file)
    assert tokenizer.encode("ab" * 450).tolist() == HFTokenizer(hf_file).encode("ab").tolist() * 450
    assert len(tokenizer.encode("ab")) == 2
    # A run that began when they were applied is told.
    assert ":whole:" in tokenizer.fingerprint and ":whole:" not in before


def test_a_bare_file_is_ended_by_what_usually_ends_texts(hf_file):
    plain = HFTokenizer(hf_file)
    assert (plain.bos_id, plain.eos_id, plain.vocab_size) == (None, 257, 259)
    config = {"bos_token": None, "eos_token": {"content": "<|done|>"}}
    (hf_file.parent / "tokenizer_config.json").write_text(json.dumps(config))
    named = build_tokenizer(str(hf_file.parent))
    assert (named.bos_id, named.prefix, named.eos_id) == (None, (), 258)
    assert named.fingerprint != plain.fingerprint


def test_a_folder_prefers_json(hf_file, ranks_file):
    """Ranks of another vocabulary are not those of the tokenizer.json."""
    folder = hf_file.parent
    assert isinstance(build_tokenizer(str(folder)), HFTokenizer)
    ranks_file.rename(folder / "tokenizer.model")
    assert isinstance(build_tokenizer(str(folder)), HFTokenizer)
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")
    assert isinstance(build_tokenizer(str(folder)), HFTokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15"),
        ("spiece.model", b"\n\x0e\n\x05<unk>\x15"),
        ("sentencepiece.bpe.model", b"\n\x0e\n\x05<unk>\x15"),
        ("vocab.json", b'{"a": 0}'),
    ],
)
def test_what_is_not_read_is_named_with_the_way_out(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "merges.txt").write_text("")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"AutoTokenizer.*save_pretrained") as error:
            build_tokenizer(str(path))
        assert ("vocab.json" if "json" in name else "SentencePiece") in str(error.value)
        assert "\n" not in str(error.value)


def test_original_folder(tmp_path, ranks_file):
    folder = tmp_path / "assets" / "original"
    folder.mkdir(parents=True)
    ranks_file.rename(folder / "tokenizer.model")
    assert build_tokenizer(str(tmp_path / "assets")).vocab_size == 264


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (rank_lines(BYTES) + b"@@@ 256\n", r":257: expected a base64 token and its rank"),
        (rank_lines(BYTES) + b"YQ 256\n", r":257: expected a base64 token"),
        (rank_lines(BYTES) + b"YWI=\n", r":257: expected a base64 token"),
        (rank_lines(BYTES) + b"YQ== 256\n", r":257: token b'a' has a rank already"),
        (rank_lines(BYTES) + b"YWI= 300\n", "257 ranks must be 0 to 256"),
        (rank_lines(BYTES[:-1]), "no token for byte 255"),
        (b"\x08\x01", r":1: expected a base64 token"),
    ],
)
def test_malformed_ranks(tmp_path, data, message):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        build_tokenizer(str(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_missing_and_wrong_files(tmp_path, hf_file, monkeypatch):
    with pytest.raises(UserError, match=r"no such file or folder .* word byte\)$"):
        build_tokenizer(str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"looked for in {tmp_path}: .*: hf download org/words "):
        build_tokenizer("org/words")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder holds none of"):
        build_tokenizer(str(tmp_path / "empty"))
    hf_file.write_text("{}")
    with pytest.raises(UserError, match=r"not a readable tokenizer\.json"):
        build_tokenizer(str(hf_file))


def test_hf_without_an_end_token(hf_file):
    data = json.loads(hf_file.read_text())
    data["added_tokens"] = []
    hf_file.write_text(json.dumps(data))
    with pytest.raises(UserError, match="no end-of-text token found"):
        build_tokenizer(str(hf_file))
    settings = hf_file.parent / "tokenizer_config.json"
    settings.write_text('{"eos_token": {"a": 1}}')  # names none
    with pytest.raises(UserError, match="no end-of-text token found"):
        build_tokenizer(str(hf_file))
    for text, message in (
        ("[", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"eos_token": 5}', "eos_token = 5, expected a token"),
        ('{"bos_token": {"content": [1]}}', "bos_token = .*, expected a token"),
    ):
        settings.write_text(text)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: {message}"):
            build_tokenizer(str(hf_file))


@pytest.mark.parametrize("kind", ["ranks_file", "hf_file"])
def test_a_lone_surrogate_is_a_question_mark(kind, request):
    """JSON can spell one, and no encoding of text has it."""
    tokenizer = build_tokenizer(str(request.getfixturevalue(kind)))
    expected = tokenizer.encode("a?b").tolist()
    if kind == "ranks_file":  # tiktoken's own stand-in
        expected = tokenizer.encode("a\ufffdb").tolist()
    assert tokenizer.encode("a\ud800b").tolist() == expected
