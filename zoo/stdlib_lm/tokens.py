"""Byte-level BPE of stdlib-lm, by the library ``tokenizers``; any text comes back exactly."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = Path(__file__).parent / "tokenizer.json"
VOCABULARY = 4096
END = "<|endoftext|>"
END_ID = 0

# A line break and the indentation after it stay together, so that one token says how deep the next line is; a word
# takes the one character before it along, such as the dot of an attribute.
PIECES = r"(?:\r?\n[ \t]*)+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t]+"


def trained(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of ``VOCABULARY`` tokens: the end of text, all bytes, and merges learned from ``texts``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return _plain(made)


def load(path: Path) -> Tokenizer:
    """The tokenizer that a file holds."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise OptpassError(
            "missing-library", "tokenizers is not installed", "install the extra: pip install 'optpass[hf]'"
        ) from error
    return _plain(Tokenizer.from_file(str(path)))


def _plain(made: Tokenizer) -> Tokenizer:
    # Text that spells the end of text means its letters; the file cannot say so.
    made.encode_special_tokens = True
    return made


@functools.cache
def tokenizer() -> Tokenizer:
    """The tokenizer that the shipped weights were trained with."""
    return load(FILE)


def encode(text: str) -> NDArray[np.int64]:
    """Token ids ``[tokens]`` of a text."""
    return np.array(tokenizer().encode(text).ids, np.int64)


def decode(ids: Iterable[int]) -> str:
    """The text of token ids; bytes that are no whole character read as U+FFFD."""
    return tokenizer().decode([int(i) for i in ids], skip_special_tokens=False)


def stream(made: Tokenizer, texts: Iterable[str]) -> NDArray[np.int64]:
    """Token ids ``[tokens]`` of texts, one after the other, each ended by the end of text."""
    return np.concatenate([np.array([*made.encode(text).ids, END_ID], np.int64) for text in texts])


def sizes(made: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text that each token stands for, ``[vocabulary]``; none for the end of text."""
    found = np.zeros(made.get_vocab_size(), np.int64)
    for name, i in made.get_vocab().items():
        found[i] = len(name)  # in the names of byte-level tokens each character is one byte
    found[END_ID] = 0
    return found
