"""CLIP's tokens: texts to the numbers of its byte-pair encoding. Imports neither torch nor open_clip.

Notable: texts are cleaned as open_clip does, which leaves single spaces. No token crosses a space, and what lies
between two spaces is seldom new. It is cut into words and encoded once, by the library `tokenizers`, and then looked
up. So a text is a few look-ups, and one core reads eight times as many texts as with that library's own pipeline. A
test compares the result with open_clip's own tokenizer.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import regex
from tokenizers.models import BPE

from ceca.errors import UserError

CONTEXT = 77  # tokens that CLIP reads; a model may read more
START, END, MASK = 49406, 49407, 49405  # as in IRRA, the rarest merge gives its number to the mask
SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
NUMBER = np.dtype(np.uint16)  # of a token: there are 49,408
AT_ONCE = 4096  # texts whose tokens are put into the array together
REMEMBERED, LONGEST = 2**17, 64  # pieces of text whose tokens are kept, and the longest of them in characters
MERGES = 49152 - 256 - 2  # those of the vocabulary file that CLIP uses

WORD = regex.compile(
    "|".join(SPECIAL) + r"""|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""", regex.IGNORECASE
)


def tokenize_numpy(texts: Sequence[str], context: int = CONTEXT) -> np.ndarray:
    """Texts → [B, context] int64 token ids: start, words, end, then zeros; longer texts are cut."""
    ids = np.zeros((len(texts), context), dtype=np.int64)
    most = (context - 2) * NUMBER.itemsize
    start, end = _written([START]), _written([END])
    for first in range(0, len(texts), AT_ONCE):
        tokens = [b"".join((start, _encode(text)[:most], end)) for text in texts[first : first + AT_ONCE]]
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens)) // NUMBER.itemsize
        rows = ids[first : first + AT_ONCE]
        rows[np.arange(context) < lengths[:, None]] = np.frombuffer(b"".join(tokens), NUMBER)
    return ids


def count_tokens(text: str) -> int:
    """Length of a text in tokens with start and end, not cut: above its context, a model does not see its end."""
    return len(_encode(text)) // NUMBER.itemsize + 2


def encode(text: str) -> list[int]:
    """Token ids of a text without start and end, not cut."""
    ids: list[int] = np.frombuffer(_encode(text), NUMBER).tolist()
    return ids


def _encode(text: str) -> bytes:
    """Token ids of a text as `NUMBER`s: bytes are joined in a tenth of the time of lists."""
    return b"".join(map(_PIECES.__getitem__, _clean(text).split(" ")))


def _written(ids: Iterable[int]) -> bytes:
    return np.array(list(ids), NUMBER).tobytes()


class _Pieces(dict[str, bytes]):
    """Token ids of what lies between two spaces, as `NUMBER`s, by what it is."""

    def __missing__(self, piece: str) -> bytes:
        ids = _written(token for word in WORD.findall(piece) for token in _encode_word(word))
        if len(piece) <= LONGEST:
            if len(self) >= REMEMBERED:
                self.clear()
            self[piece] = ids
        return ids


_PIECES = _Pieces()


def _clean(text: str) -> str:
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else there is nothing to mend
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _encode_word(word: str) -> tuple[int, ...]:
    if word in SPECIAL:
        return (SPECIAL[word],)
    letters = _letters()
    return tuple(token.id for token in _model().tokenize("".join(letters[byte] for byte in word.encode())))


@functools.cache
def _letters() -> list[str]:
    """A printable character for each byte, as the vocabulary writes it: itself where it is printable."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return [letters[byte] for byte in range(256)]


@functools.cache
def _model() -> BPE:
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise UserError("the package open_clip_torch is not installed; install the project's requirements")
    lines = gzip.decompress((Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [(first, second) for first, second in map(str.split, lines.split("\n")[1 : MERGES + 1])]
    letters = _letters()
    printable = [letters[byte] for byte in sorted(range(256), key=lambda byte: (ord(letters[byte]) > 255, byte))]
    symbols = [*printable, *(f"{letter}</w>" for letter in printable), *(first + second for first, second in merges)]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    return BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
