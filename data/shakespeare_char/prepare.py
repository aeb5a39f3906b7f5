"""Makes data/shakespeare_char: tiny Shakespeare, one token per character (65 symbols, 1,003,854 + 111,540 tokens)."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

from data import corpus


@dataclass
class Tokenizer:
    """Prepare data/shakespeare_char: Shakespeare's lines, one token per character."""

    tokenizer: str = "char"  # char, gpt2, byte or sentencepiece


if __name__ == "__main__":
    corpus.prepare_shakespeare(__file__, Tokenizer)
