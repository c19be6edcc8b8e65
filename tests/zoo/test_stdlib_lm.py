"""stdlib-lm: its tokenizer, its held-out text, prompts and weights, and its recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optpass.errors import OptpassError
from optpass.zoo import registry
from optpass.zoo.stdlib_lm import attention, data, edits, entry, model, tokens, train

PIECES = ("def f(x):", "    return x", "\t", "\r\n", "\n\n", "  ", "é", "日本", tokens.END, "\0")


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
@settings(max_examples=200)
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert entry.decode(entry.encode(text)) == text


def test_a_line_break_and_its_indentation_are_one_token() -> None:
    for depth in (0, 4, 8, 12):
        assert len(entry.encode("\n" + " " * depth)) == 1
    assert entry.decode(entry.encode("x\n    y")[1:2]) == "\n    "


def test_end_of_text_spelt_in_a_text_is_no_end() -> None:
    assert tokens.END_ID not in entry.encode(tokens.END)
    assert tokens.stream(entry.tokenizer(), ["a"])[-1] == tokens.END_ID


def test_sizes_of_tokens_add_up_to_the_bytes_of_a_text() -> None:
    for text in data.held_out().values():
        assert tokens.sizes(entry.tokenizer())[entry.encode(text)].sum() == len(text.encode())


def test_held_out_modules_are_not_trained_on() -> None:
    assert len(data.held_out()) == len(data.HELD_OUT)
    assert not any(data.is_trained_on(Path(path)) for path in data.HELD_OUT)
    trained = ("argparse.py", "asyncio/base_events.py", "json/encoder.py")
    assert all(data.is_trained_on(Path(path)) for path in trained)
    assert not data.is_trained_on(Path("encodings/cp1252.py"))


def write(folder: Path, path: str, text: str) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of the held-out modules, three others, and one of a package that is not read."""
    folder = tmp_path / "library"
    for path, text in data.held_out().items():
        write(folder, path, text)
    for path, copied in {"argparse.py": "shlex.py", "os.py": "tempfile.py", "xml/sax.py": "textwrap.py"}.items():
        write(folder, path, data.held_out()[copied])
    write(folder, "idlelib/run.py", "pass\n")
    monkeypatch.setenv("OPTPASS_DATA", str(folder))
    return folder


def test_training_text_is_what_the_rules_leave(library: Path) -> None:
    assert list(data.training()) == ["argparse.py", "os.py", "xml/sax.py"]
    assert data.version() == "unknown"


def test_shipped_text_is_what_pack_writes(library: Path) -> None:
    data.pack(library / "test.safetensors")
    assert (library / "test.safetensors").read_bytes() == data.SHIPPED.read_bytes()


def test_directory_without_the_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPTPASS_DATA", str(tmp_path))
    with pytest.raises(OptpassError, match="lacks the files of Python's standard library"):
        data.directory()


def test_count_of_windows_is_checked() -> None:
    split = entry.test_split(3)
    assert split["input_ids"].shape == (3, 256)
    assert np.array_equal(split["input_ids"], split["labels"])
    with pytest.raises(OptpassError, match="ask for 1 to"):
        entry.test_split(0)


def test_weights_know_more_of_the_held_out_text_than_how_often_each_token_occurs() -> None:
    module, _, kwargs = entry.factory()
    windows = entry.test_split(8)["input_ids"]
    # A model that knows how often each token occurs in this very text, and nothing else: no unigram model does better.
    counts = np.bincount(windows.ravel())
    shares = counts[counts > 0] / counts.sum()
    unigram = float(-(shares * np.log(shares)).sum())
    with torch.no_grad():
        found = float(train.loss(module, torch.from_numpy(windows)).mean())
    assert kwargs["input_ids"].shape == (2, 64)
    assert math.exp(found) < 0.25 * math.exp(unigram)


@pytest.mark.parametrize("kind", ["completion", "edit", "open"])
def test_prompts_are_many_of_the_lengths_promised_and_the_same_each_time(kind: str) -> None:
    least, most = {"completion": (64, 256), "edit": (64, 512), "open": (16, 64)}[kind]
    found = entry.prompts(kind, 70)
    assert all(prompt.dtype == np.int64 and least <= len(prompt) <= most for prompt in found)
    assert len({prompt.tobytes() for prompt in found}) == 70
    assert all(np.array_equal(a, b) for a, b in zip(found[:5], entry.prompts(kind, 5), strict=True))


def test_what_prompts_there_are_not_is_said() -> None:
    with pytest.raises(OptpassError, match="kinds are completion, edit, open"):
        entry.prompts("opening", 1)
    with pytest.raises(OptpassError, match="ask for 1 to"):
        entry.prompts("edit", 10_000)


def test_renaming_follows_a_name_and_leaves_attributes() -> None:
    (function,) = edits.functions("class A:\n    def f(self, key):\n        return self.key[key]\n")
    assert function.names == ("key",)
    given, wanted = edits.task(function, ["key", "name"], np.random.default_rng(0)) or ("", "")
    assert given == (
        "# before\ndef f(self, key):\n    return self.key[key]\n\n# after, with key renamed to name\ndef f(self, name):"
    )
    assert wanted == "\n    return self.key[name]"


def test_text_continues_token_by_token() -> None:
    module, _, _ = entry.factory()
    ids = torch.from_numpy(entry.prompts("completion", 1)[0])[None]
    with torch.no_grad():
        for _ in range(8):
            logits = module(input_ids=ids, use_cache=False).logits  # type: ignore[operator]
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert entry.decode(ids[0].tolist()).startswith(entry.decode(entry.prompts("completion", 1)[0]))


@pytest.mark.parametrize("length", [1, 256, 300])
def test_attention_of_the_training_is_that_of_the_model(length: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    found, _ = attention.attend(None, query, key, value, None, 8**-0.5)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found.transpose(1, 2), wanted)


class Interrupted(Exception):
    """Raised by the test in the middle of a training."""


@pytest.mark.usefixtures("library")
def test_recipe_writes_what_loads_and_goes_on_where_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"WIDTH": 16, "DEPTH": 1, "INNER": 16, "QUERIES": 2, "KEYS": 1, "HEAD_DIM": 8}.items():
        monkeypatch.setattr(model, name, value)
    sizes = {"STEPS": 4, "BATCH": 2, "LENGTH": 64, "LONG_EVERY": 3, "CHECKPOINT_EVERY": 2, "LONGEST": 512}
    for name, value in sizes.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(model, "POSITIONS", 128)
    monkeypatch.setattr(entry, "TOKENS", 128)
    short = {"csv.py": data.held_out()["csv.py"]}
    monkeypatch.setattr(data, "held_out", lambda: short)
    whole = train.train(tmp_path / "whole", lambda *_: None)
    steps: list[int] = []

    def interrupt(done: int, total: int, text: str) -> None:
        steps.append(done)
        if steps == [1, 2, 3]:
            raise Interrupted

    with pytest.raises(Interrupted):
        train.train(tmp_path / "parts", interrupt)
    assert train.train(tmp_path / "parts", interrupt) == whole
    assert steps == [1, 2, 3, 3, 4]
    (facts,) = json.loads((tmp_path / "parts" / "training.json").read_text())
    assert facts["test_perplexity"] == whole
    assert facts["tokens"] == 4 * 2 * 64
    model.load(tmp_path / "parts" / "model.safetensors")
    assert tokens.load(tmp_path / "parts" / "tokenizer.json").get_vocab_size() <= tokens.VOCABULARY


def test_zoo_describes_the_model() -> None:
    told = registry.describe("stdlib-lm")
    assert told["metric"] == "perplexity"
    assert told["quality"] > 1
