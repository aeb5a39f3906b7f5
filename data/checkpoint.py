"""
Checkpoint files: written whole or not at all, read without running what they hold, and only as they were written.

Used through model.py, which has the names that others import.
"""

import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import torch

from data.files import checked_zip, is_file

CHECKPOINT_FORMAT = 2  # 1: kan_wavelet="dog" was what is now "gaus1", and subspace_rank came before other limits


# what unpickling bytes that were flipped or cut off can raise
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
DAMAGE += (ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error)
PLAIN = (bool, int, float, str, bytes, type(None))


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or of another version; the message says what to do."""


def plain(value, where="the checkpoint"):
    """`value` in the types that `load_checkpoint` reads: scalars of NumPy become Python's; else CheckpointError."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {plain(k, where): plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    if getattr(value, "ndim", None) == 0 and type(value.item()) in PLAIN:
        return value.item()
    raise CheckpointError(f"{where} is a {type(value).__name__}: only tensors and plain values can be read back")


def save_checkpoint(path, checkpoint):
    """torch.save to `path` so that a kill at any instant leaves the old file or the new one, never half of one.

    CheckpointError if it cannot be written (a full disk, say) or not be read back; an old file is then still there.
    """
    path, content = Path(path), plain(checkpoint)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(content | {"format": CHECKPOINT_FORMAT}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself reaches the disk only with its directory
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch's zip writer raises its own error on top
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{path}: cannot be written ({cause.strerror}); an older one is untouched") from e
    finally:
        temporary.unlink(missing_ok=True)


def looks_like_pickle(path):
    """Whether a file starts as pickles do: protocol 2 and later, torch's zip files, or protocol 0's first words."""
    with open(path, "rb") as f:
        start = f.read(2)
    return start == b"PK" or start[:1] in (b"\x80", b"c", b"(")


def named(parts, kind):
    """Whether `parts` is a dict from names to instances of `kind`."""
    return isinstance(parts, dict) and all(isinstance(k, str) and isinstance(v, kind) for k, v in parts.items())


def storage_bytes(value):
    """{address: bytes} of the storages of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {address: size for part in parts for address, size in storage_bytes(part).items()}


def read_checked(path, map_location, mmap):
    """torch.load of a checkpoint file, whose bytes must be those that were written (see `checked_zip`)."""
    if not zipfile.is_zipfile(path):  # PyTorch before 1.6: no checksums in it
        return torch.load(path, map_location=map_location, weights_only=True)
    with checked_zip(path) as size:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        if sum(storage_bytes(checkpoint).values()) > size:
            raise ValueError("tensors larger than the records they lie in")
    return checkpoint


def of_format_2(args, path):
    """Format 1's model flags in format 2's meaning; CheckpointError where there are none that mean the same."""
    if args.get("kan_wavelet") == "dog":  # the name was given to another wavelet
        args = args | {"kan_wavelet": "gaus1"}
    others = [name for name in ("resid_topk", "vq_codes", "vq_lattice") if args.get(name)]
    if args.get("subspace_rank") and others:
        raise CheckpointError(f"{path}: subspace_rank came before {others[0]} when it was trained, and comes after it "
                              "now; train it again, or check out an older version")  # fmt: skip
    return args


def load_checkpoint(path, map_location="cpu", mmap=False):
    """The dict in a checkpoint file of nanoChimera or nanoGPT, with `model` as a clean state dict.

    Read with weights_only=True: tensors and plain values, never code. CheckpointError, one line, for anything else, and
    for a file that is not, to the last byte, what was written. mmap: tensors stay in the file until they are used.
    """
    path = Path(path)
    try:
        if not is_file(path):
            raise CheckpointError(f"{path}: no such checkpoint; train one first, or set --out_dir")
        checkpoint = read_checked(path, map_location, mmap)
    except CheckpointError:
        raise
    except PermissionError:
        raise CheckpointError(f"{path}: may not be read by this user") from None
    except pickle.UnpicklingError as e:
        text = str(e)
        if "Unsupported global" in text or "GLOBAL" in text or (looks_like_pickle(path) and "Unsupported" in text):
            raise CheckpointError(f"{path}: holds code, not only tensors; refused, nothing in it was run") from e
        raise CheckpointError(f"{path}: damaged or not a checkpoint; restore a copy or train again") from e
    except zipfile.BadZipFile as e:
        raise CheckpointError(f"{path}: damaged ({e}); restore a copy or train again") from e
    except DAMAGE as e:
        why = f" ({e})" if isinstance(e, OSError) else ""
        raise CheckpointError(f"{path}: truncated or damaged{why}; restore a copy or train again") from e
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if not (named(parts.get("model"), torch.Tensor) and named(parts.get("model_args"), object)):
        raise CheckpointError(f"{path}: a PyTorch file, but no checkpoint of nanoChimera or nanoGPT")
    version = checkpoint.get("format", 0)  # nanoGPT's own has none
    if type(version) is not int or version not in range(CHECKPOINT_FORMAT + 1):
        raise CheckpointError(f"{path}: format {version}, but this version reads up to {CHECKPOINT_FORMAT}; update")
    if version < 2:
        checkpoint["model_args"] = of_format_2(checkpoint["model_args"], path)
    # nanoGPT: torch.compile's prefix, and the causal mask that it keeps as a buffer without flash attention
    weights = {k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
    checkpoint["model"] = {k: v for k, v in weights.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    return checkpoint
