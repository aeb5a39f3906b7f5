"""Makes data/shakespeare: tiny Shakespeare in the BPE of GPT-2 (301,966 + 36,059 tokens)."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

from data import corpus


@dataclass
class Tokenizer:
    """Prepare data/shakespeare: Shakespeare's lines, in the BPE of GPT-2."""

    tokenizer: str = "gpt2"  # char, gpt2, byte or sentencepiece


if __name__ == "__main__":
    corpus.prepare_shakespeare(__file__, Tokenizer)
