"""
Our tokenizers (data/corpus.py) in the format of the `tokenizers` library, for Hugging Face's AutoTokenizer.

Same ids for every text. Two differences: a special token comes back by its name, such as </s>, where ours gives
nothing; and where a text spells the name of one of sentencepiece's special pieces, "<pad>" or "<0x41>", the pieces
around it may be others, which give the same text.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from data.corpus import DataError

EOS, PAD, UNK, END_OF_TEXT = "</s>", "<pad>", "<unk>", "<|endoftext|>"
# named like a piece that stands for no text: cut behind its first character, so that it is none
NAMES = Regex(f"<(?=(?:0x[0-9A-F]{{2}}|{'|'.join(name[1:-1] for name in (EOS, PAD, UNK))})>)")


def alphabet():
    """How byte-level tokenizers write the bytes 0 to 255: printable ones as themselves, others from U+0100 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(b if b in shown else next(others)) for b in range(256)]


def merge_of(token, ranks):
    """The two parts whose merge makes `token`: what its bytes become by all merges before its own."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def of_char(char):
    made = Tokenizer(models.WordLevel(char.ids))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made, {}


def byte_level(vocab, merges, use_regex):
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.decoder = decoders.ByteLevel()
    return made


def of_byte(byte):
    vocab = {PAD: 0, EOS: 1, UNK: 2} | {letter: 3 + b for b, letter in enumerate(alphabet())}
    return byte_level(vocab, [], False), {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK}


def of_gpt2(gpt2):
    letters, ranks = alphabet(), {piece: i for i, piece in enumerate(gpt2.pieces[: gpt2.eot])}

    def written(piece):
        return "".join(letters[b] for b in piece)

    merges = [tuple(map(written, merge_of(piece, ranks))) for piece in ranks if len(piece) > 1]
    vocab = {written(piece): i for piece, i in ranks.items()} | {END_OF_TEXT: gpt2.eot}
    return byte_level(vocab, merges, True), {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}


def of_sentencepiece(sentencepiece):
    sp, space = sentencepiece.sp, sentencepiece.SPACE
    pieces = [(sp.id_to_piece(i).replace(space, " "), sp.get_score(i)) for i in range(sentencepiece.vocab_size)]
    made = Tokenizer(models.Unigram(pieces, unk_id=sp.unk_id(), byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Split(NAMES, "isolated")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made, {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK}


MAKERS = {"char": of_char, "byte": of_byte, "gpt2": of_gpt2, "sentencepiece": of_sentencepiece}


def write_tokenizer(tokenizer, directory, longest):
    """tokenizer.json and tokenizer_config.json of one of our tokenizers; its special tokens by name.

    In a text, the name of a special token is text, as with ours. longest: the model's block_size.
    """
    if tokenizer.name not in MAKERS:
        raise DataError(f"the tokenizer {tokenizer.name!r} has no form for the tokenizers library")
    made, special = MAKERS[tokenizer.name](tokenizer)
    made.add_special_tokens(sorted(set(special.values())))
    made.save(str(Path(directory, "tokenizer.json")))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest} | special
    config |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}
    Path(directory, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return special
