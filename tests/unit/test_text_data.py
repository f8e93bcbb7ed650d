"""Documents, tokenizers and windows: no text is lost, and nothing is counted twice."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from denied import limit_file_size
from hypothesis import given
from hypothesis import strategies as st
from text_files import make_text

from bigincubate.data.text import documents as reading
from bigincubate.data.text.documents import Document, read_documents
from bigincubate.data.text.files import LINES, PIECES, TextFile, find_text, form_of, holds_only_text
from bigincubate.data.text.html import html_to_text
from bigincubate.data.text.made_up import list_made_up, write_made_up
from bigincubate.data.text.tokenizers import SEPARATOR, ByteTokenizer, FileTokenizer, Tokenizer, train_bpe
from bigincubate.data.text.windows import cut_windows, join_documents, token_type
from bigincubate.errors import ConfigError, DataError, MissingDependencyError

# ------------------------------------------------------------------------------------------------ windows


@given(length=st.integers(0, 60), window=st.integers(1, 20))
def test_each_token_but_the_first_is_a_target_once(length: int, window: int) -> None:
    tokens = np.arange(length)
    windows = list(cut_windows(tokens, window, keep_rest=True))
    targets = [token for piece in windows for token in piece[1:].tolist()]
    assert targets == list(range(1, length))
    assert all(piece[0] == piece[1] - 1 for piece in windows)
    full = list(cut_windows(tokens, window, keep_rest=False))
    assert {len(piece) for piece in full} <= {window + 1}
    assert len(full) == max(length - 1, 0) // window


def test_documents_are_joined_by_separators() -> None:
    tokens = join_documents(["ab", "", "c"], ByteTokenizer())
    assert tokens.tolist() == [256, 97, 98, 256, 256, 99]
    assert tokens.dtype == np.uint16
    assert (token_type(2**16), token_type(2**16 + 1)) == (np.uint16, np.uint32)
    assert len(join_documents([], ByteTokenizer())) == 0


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers")
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe([make_text(number) for number in range(200)], 300, file)
    return file


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else FileTokenizer(request.getfixturevalue("trained"))


TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([SEPARATOR, "endoftext", "\r\n", "  ", "tide", "e\u0301"])
).map("".join)


@given(text=TEXTS)
def test_tokenizers_are_lossless_and_count_bytes(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.byte_lengths()[tokens].sum() == len(text.encode())
    assert tokenizer.separator not in tokens
    assert all(0 <= token < tokenizer.vocabulary for token in tokens)


def test_separator_has_no_text(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.byte_lengths()
    assert (len(lengths), lengths[tokenizer.separator]) == (tokenizer.vocabulary, 0)
    assert tokenizer.decode([tokenizer.separator]) == ""
    assert (np.delete(lengths, tokenizer.separator) > 0).all()


def test_bpe_is_the_same_when_it_is_trained_again(trained: Path, tmp_path: Path) -> None:
    texts = [make_text(number) for number in range(200)]
    train_bpe(texts, 300, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == trained.read_bytes()
    tokenizer = FileTokenizer(trained)
    assert tokenizer.vocabulary == 300
    assert sum(len(tokenizer.encode(text)) for text in texts) < sum(len(text.encode()) for text in texts) / 2
    assert [path.name for path in tmp_path.iterdir()] == ["again.json"]


def change(content: dict[str, Any], how: str) -> None:
    """Change a tokenizer so that it is refused."""
    if how == "normalizer":
        content["normalizer"] = {"type": "NFC"}
    elif how == "prefix":
        content["pre_tokenizer"]["add_prefix_space"] = True
    elif how == "whitespace":
        content["pre_tokenizer"] = {"type": "Whitespace"}
    elif how == "removes":
        step = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, content["pre_tokenizer"]]}
    elif how == "wordpiece":
        content["model"] = {"type": "WordPiece", "vocab": {}}
    elif how == "dropout":
        content["model"]["dropout"] = 0.1
    elif how == "no end":
        content["added_tokens"] = []
    elif how == "byte":
        content["model"]["vocab"] = {key: n for key, n in content["model"]["vocab"].items() if key != "!"}
    elif how == "spaces":
        token = {**content["added_tokens"][0], "id": 300, "content": "tide", "special": False, "lstrip": True}
        content["added_tokens"].append(token)
    elif how == "shape":
        del content["model"]
    elif how == "merges":
        content["model"]["merges"].append(["no", "such"])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("normalizer", "its normalizer NFC changes text"),
        ("prefix", "it adds a space before text"),
        ("whitespace", "only byte-level BPE is supported, which has the pre-tokenizer ByteLevel; it has Whitespace"),
        ("removes", "its pre-tokenizer Split removes text"),
        ("wordpiece", "its model is WordPiece, but only byte-level BPE is supported"),
        ("dropout", "its model has dropout = 0.1"),
        ("no end", "it has no end-of-text token to separate documents"),
        ("byte", "it has no token for 1 of the 256 bytes, such as 33"),
        ("spaces", "its token 'tide' removes adjacent spaces"),
        ("shape", "it was not written by the library tokenizers"),
        ("merges", "is refused: "),
    ],
)
def test_tokenizer_that_may_lose_something_is_refused(trained: Path, tmp_path: Path, how: str, says: str) -> None:
    content = json.loads(trained.read_bytes())
    change(content, how)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=says) as fault:
        FileTokenizer(file)
    assert "\n" not in str(fault.value)


def test_end_of_text_token_is_not_recognized_in_text(trained: Path, tmp_path: Path) -> None:
    content = json.loads(trained.read_bytes())
    content["added_tokens"][0]["special"] = False
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    text = f"a{SEPARATOR}b"
    assert tokenizer.separator not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with limit_file_size(1000), pytest.raises(OSError, match="File too large") as caught:
        train_bpe([make_text(number) for number in range(20)], 300, tmp_path / "tokenizer.json")
    assert str(caught.value.filename).startswith(f"{tmp_path}/.tmp-tokenizer.json-")
    assert list(tmp_path.iterdir()) == []


def test_missing_file_of_a_tokenizer_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        FileTokenizer(tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------ files


def test_suffix_determines_the_form(tmp_path: Path) -> None:
    forms = {"a.TXT": "plain", "a.jsonl.gz": "lines", "a.txt.gz": None, "a.png": None, "README": None}
    assert {name: form_of(name) for name in forms} == forms
    assert not holds_only_text(tmp_path)
    (tmp_path / "a.md").write_text("x")
    assert holds_only_text(tmp_path)
    assert holds_only_text(tmp_path / "a.md")
    (tmp_path / "b.png").write_bytes(b"x")
    assert not holds_only_text(tmp_path)


def test_folder_has_a_domain_for_each_folder_and_skips_what_is_no_text(tmp_path: Path) -> None:
    for name in (
        "a/x.txt",
        "a/deep/y.py",
        "b/z.html",
        "top.md",
        ".git/config.txt",
        "b/page.js",
        "b/i.png",
        "b/LICENSE",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    source = find_text(str(tmp_path))
    assert [(file.name, file.domain, file.form) for file in source.files] == [
        ("a/deep/y.py", "a", "plain"),
        ("a/x.txt", "a", "plain"),
        ("b/z.html", "b", "html"),
        ("top.md", ".", "plain"),
    ]
    assert source.notes["skipped"] == {".js": 1, ".png": 1, "without a suffix": 1}


def test_folder_without_folders_is_one_domain(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "y.js").write_text("y")  # kept, because there are no HTML pages
    assert {file.domain for file in find_text(str(tmp_path)).files} == {"text"}
    assert len(find_text(str(tmp_path)).files) == 2


def test_source_without_text_is_one_line(tmp_path: Path) -> None:
    for name in ("images", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "x.png").write_bytes(b"x")
    (tmp_path / "data" / "dataset.json").write_text("{}")
    for name in ("train", "validation"):
        (tmp_path / "splits" / name).mkdir(parents=True)
        (tmp_path / "splits" / name / "a.txt").write_text(name)
    for name, says in (
        ("images", "no text in .*: found 1 .png; expected a folder"),
        ("images/x.png", "unknown kind of text"),
        ("none", "no such source"),
        ("data", "is prepared data already"),
        ("splits", "has train/, validation/, but the splits of text are chosen by the names of documents"),
    ):
        with pytest.raises(DataError, match=says):
            find_text(str(tmp_path / name))


def test_standard_library_is_that_of_the_running_interpreter() -> None:
    import platform

    source = find_text("stdlib")
    assert source.notes["interpreter"] == f"CPython {platform.python_version()}"
    assert len(source.files) + source.notes["missing_modules"] == 590
    assert source.notes["missing_modules"] < 100
    names = {file.name for file in source.files}
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert 9e6 < sum(file.stamp[0] for file in source.files) < 13e6


def test_made_up_text_never_changes() -> None:
    texts = [write_made_up(name) for name, _ in list_made_up()]
    assert hashlib.sha256("".join(texts).encode()).hexdigest() == MADE_UP_TEXT
    assert len(set(texts)) == len(texts) == 64


MADE_UP_TEXT = "c3aedc496c4ed31f14b09af77cab641aa51894f4eb94008931da7906406c6668"


# ------------------------------------------------------------------------------------------------ documents


def read(path: Path, form: str | None = None, column: str = "text") -> list[Document]:
    return list(read_documents(TextFile(path.name, str(path), "text", form or str(form_of(path.name))), column))


def test_pieces_of_a_file_contain_all_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 200)
    texts = [make_text(number) for number in range(40)]
    (tmp_path / "book.txt").write_bytes("\n\n".join(texts).encode())
    pieces = read(tmp_path / "book.txt", PIECES)
    assert b"".join(piece.text for piece in pieces) == (tmp_path / "book.txt").read_bytes()
    assert len(pieces) > 5
    assert all(piece.text.endswith(b"\n") for piece in pieces[:-1])
    assert sum(piece.text.endswith(b"\n\n") for piece in pieces) > len(pieces) / 2
    assert not any(piece.problem for piece in pieces)
    (tmp_path / "long.txt").write_bytes("é".encode() * 1000)
    assert [piece.text for piece in read(tmp_path / "long.txt", PIECES)] == ["é".encode() * 1000]
    (tmp_path / "lines.txt").write_bytes(b"0123456789\n" * 100)
    assert all(piece.text.endswith(b"9\n") for piece in read(tmp_path / "lines.txt", PIECES))
    (tmp_path / "empty.txt").write_bytes(b"")
    assert read(tmp_path / "empty.txt", PIECES) == []


def write_lines(file: Path, rows: list[Any]) -> bytes:
    content = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    file.write_bytes(content)
    return content


def test_compressed_and_plain_json_lines_are_documents(tmp_path: Path) -> None:
    texts = [make_text(number) for number in range(50)]
    content = write_lines(tmp_path / "a.jsonl", [{"body": text, "text": 1} for text in texts])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    zstd = pytest.importorskip("zstd")
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        found = read(tmp_path / name, column="body")
        assert [document.text.decode() for document in found] == texts
        assert len({document.name for document in found}) == 50


def test_compressed_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    zstd = pytest.importorskip("zstd")
    content = write_lines(tmp_path / "a.jsonl", [{"text": make_text(number)} for number in range(500)])
    for name, data in (("a.jsonl.gz", gzip.compress(content)), ("a.jsonl.zst", zstd.compress(content))):
        for damaged in (data[:-20], b"not compressed"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(DataError, match=f"{name} is damaged"):
                read(tmp_path / name)


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="needs pyarrow: pip install 'bigincubate[parquet]'")
def test_stream_of_zstandard_is_read_with_pyarrow(tmp_path: Path) -> None:
    content = write_lines(tmp_path / "a.jsonl", [{"text": make_text(number)} for number in range(500)])
    try:
        packed = subprocess.run(["zstd", "-c"], input=content, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("needs the program zstd")
    (tmp_path / "a.jsonl.zst").write_bytes(packed + packed)
    assert len(read(tmp_path / "a.jsonl.zst")) == 1000


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"caf\xc3\xa9\n"), ("a.html", b"<p>caf\xc3\xa9</p>"), ("a.jsonl", b'{"text": "cafe"}\n')],
)
def test_byte_order_mark_is_not_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    expected = read(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert read(tmp_path / name) == expected
    assert expected[0].text


def test_lines_that_are_no_documents_are_reported(tmp_path: Path) -> None:
    rows = [{"text": "fine"}, b"\n", b"{\n", b'{"text": "\xff"}\n', [1], {"other": 1}, {"text": 3}, {"text": None}]
    write_lines(tmp_path / "a.jsonl", [*rows, {"text": "\ud800"}])
    problems = {document.name.partition(":")[2][-1]: document.problem for document in read(tmp_path / "a.jsonl")}
    assert problems == {
        "1": "",
        "3": "not a line of JSON",
        "4": "not UTF-8: convert it with iconv",
        "5": "not a JSON object",
        "6": "no field text: it has other",
        "7": "expected text, got int",
        "8": "",
        "9": "not valid Unicode: half of a surrogate pair",
    }
    with pytest.raises(ConfigError, match=r"--column body: no such field in .*a.jsonl: its first line has text"):
        read(tmp_path / "a.jsonl", LINES, "body")


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"needs pyarrow; install it with: pip install 'bigincubate"):
        read(tmp_path / "a.parquet")


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="needs pyarrow: pip install 'bigincubate[parquet]'")
def test_column_of_parquet_files(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    texts = [make_text(number) for number in range(150)]
    write_table(pyarrow.table({"body": [*texts, None], "n": list(range(151))}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", column="body")
    assert [document.text.decode() for document in found] == [*texts, ""]
    assert len({document.name for document in found}) == 151
    with pytest.raises(ConfigError, match=r"--column text: no such column in .*: it has body, n"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", column="n")[0].problem == "expected text, got int"
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a.parquet is damaged"):
        read(tmp_path / "a.parquet", column="body")


PAGE = """<!doctype html><html><head><title>Knots &amp; ropes</title><style>p { color: red }</style>
<script>if (a < b) { alert("no") }</script></head><body><h1>A  <em>short</em>
guide</h1><p>Tie it<br/>twice.<!-- no --></p><pre>  over
    under

end</pre><table><tr><td>one</td><td>two</td></tr></table><ul><li>x<li>y</ul></body></html>"""


def test_text_of_a_page() -> None:
    lines = ["Knots & ropes", "A short guide", "Tie it", "twice.", "  over", "    under", "", "end", "one", "two", "x"]
    assert html_to_text(PAGE).splitlines() == [*lines, "y"]
    assert html_to_text("") == ""
    assert html_to_text("<p>open <script>x") == "open\n"


@pytest.mark.parametrize("section", ["<![<p>", "<![ endif]>", "<![if !IE]>", "<![CDATA[x]]>", "<![]>", "<![endif]-->"])
def test_marked_section_is_a_comment_as_in_browsers(section: str) -> None:
    assert html_to_text(f"<p>a</p>{section}<p>b</p><script>//<![CDATA[ x </script><p>c").splitlines() == ["a", "b", "c"]


def test_pipe_in_a_folder_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "b.txt")
    source = find_text(str(tmp_path))
    assert [file.name for file in source.files] == ["a.txt"]
    assert source.notes["skipped"] == {"pipe or device": 1}
