"""A byte-pair tokenizer of CLIP's kind, learned from the captions: every word of the world is one token.

Files and behaviour are those of transformers' CLIPTokenizer (vocab.json, merges.txt); unknown words fall into pieces.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

MAX_TOKENS = 40  # the longest caption of the world has fewer; half of CLIP's 77 halves the text encoder's work
START, END = "<|startoftext|>", "<|endoftext|>"
# Words without meaning for identifiers, and words that the methods put in front of captions.
RARE = tuple(
    a + b + c
    for a, b, c in zip(
        "skzxqvwjhtplmnrd" * 2, "kwxqzvjjvqzxwkqz" + "zqvxkjwqxzvkjqxv", "swqzvkxqzjvqzxkw" * 2, strict=True
    )
)
EXTRA = [
    "photo",
    "collage",
    "grayscale",
    "greyscale",
    "crop",
    "horizontal",
    "flip",
    "zoom",
    "rendering",
    "good",
    "cropped",
    "dark",
    "bright",
    "cool",
    "nice",
    "weird",
    "clean",
    "dirty",
    "my",
    "one",
    "another",
    "black",
    "silver",
    "object",
    "thing",
    "toy",
    "dog",
    "person",
]


def byte_letters() -> dict[int, str]:
    """A printable letter for each byte, as GPT-2 and CLIP use them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def learn_merges(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token, the most frequent pair first."""
    words: dict[str, tuple[str, ...]] = {word: (*word[:-1], word[-1] + "</w>") for word in counts}
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in words.values()):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for word, pieces in words.items():
            words[word] = _merged(pieces, best)
    return merges


def _merged(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    i = 0
    while i < len(pieces):
        if pieces[i : i + 2] == pair:
            result.append(pieces[i] + pieces[i + 1])
            i += 2
        else:
            result.append(pieces[i])
            i += 1
    return tuple(result)


def write_tokenizer(captions: Iterable[str], folder: str | Path) -> dict[str, int]:
    """Learn the merges from captions and write the tokenizer's folder.

    Returns:
        The vocabulary, token to id.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts = Counter(word for text in captions for word in text.replace(",", " , ").split())
    for word in (*EXTRA, *RARE):
        counts[word] = counts.get(word, 0) + 1
    merges = learn_merges(counts)
    letters = list(byte_letters().values())
    tokens = [*letters, *(a + "</w>" for a in letters), *dict.fromkeys(a + b for a, b in merges), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    special = {
        k: {"content": v, "single_word": False, "lstrip": False, "rstrip": False, "normalized": k != "pad_token"}
        for k, v in (("bos_token", START), ("eos_token", END), ("unk_token", END))
    }
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": END}, indent=1))
    return vocab
