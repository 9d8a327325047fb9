"""Builds the world's CLIP tokenizer: every word of the grammar is one token, every other text still encodes byte by byte.

CLIP's format knows only byte-pair merges, so the merges are learned from the word list until each word is whole.
`python tokenizer.py` writes work/tokenizer.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter

from common import ASSETS, WORK
from transformers import CLIPTokenizer

sys.path.insert(0, str(ASSETS.parent))
from rewards.shapes import COLORS, NUMBERS, PLACES, RELATIONS, SHAPES

LENGTH = 20  # "a drawing of a red circle on the left and a blue square on the right" is 17 tokens with its ends


def words() -> list[str]:
    """Every word of the grammar."""
    phrases = [*COLORS, *SHAPES, *(s + "s" for s in SHAPES), "crosses", *NUMBERS, *PLACES, *RELATIONS]
    phrases += ["a an one single and of photo picture image drawing"]
    return sorted(set(" ".join(phrases).split()))


def learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is a single symbol."""
    spelled, merges = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary], []
    while any(len(word) > 1 for word in spelled):
        pairs = Counter(pair for word in spelled for pair in itertools.pairwise(word))
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        for word in spelled:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes in GPT-2's and CLIP's byte-level alphabet."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def main() -> None:
    merges, alphabet = learn_merges(words()), byte_symbols()
    symbols = [*alphabet, *(s + "</w>" for s in alphabet), *("".join(pair) for pair in merges)]
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    folder = WORK / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    print(len(symbols), "symbols;", [w for w in words() if len(tokenizer(w).input_ids) != 3], "split")


if __name__ == "__main__":
    main()
