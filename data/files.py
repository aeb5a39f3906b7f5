"""
Files that must not be lost: replaced whole, locked while a process writes, checked as they are read.

Used by train.py, model.py's checkpoints, the prepare scripts and lab/.
"""

import json
import os
import platform
import stat
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from configurator import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


def stage(path, data):
    """Write bytes beside `path` and flush them to the disk; the temporary's path, for os.replace."""
    tmp = Path(f"{path}.tmp")
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return tmp


def replace_file(path, data):
    """Write bytes under a temporary name, flush to the disk, rename: a reader sees the old file or the new one."""
    os.replace(stage(path, data), path)


def is_file(path):
    """Whether a regular file is at `path`, through links; OSError for what is neither that nor nothing.

    A fifo would be waited for, a directory or a loop of links reported as something else.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise OSError(f"{path}: is {kind}; a file is expected there")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Locks. The system drops them when the process ends, however it ends, so a stale one needs no clean-up.


def try_lock(fd):
    """Lock an open file without waiting; OSError if another process holds it."""
    if fcntl:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:  # a byte that nobody reads, since Windows refuses to read what is locked
        os.lseek(fd, 1 << 20, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        os.lseek(fd, 0, os.SEEK_SET)


def holder(path):
    """Who wrote that lock file, in words."""
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, LookupError, TypeError):  # about to be written, or gone already
        return "another process"


@contextmanager
def locked(path, doing, remedy):
    """Hold the lock file `path` while the body runs; ConfigError, with the holder and `remedy`, if another does.

    A file system without locks is told on stderr, once, and the body runs all the same.
    """
    path = Path(path)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try_lock(fd)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            raise ConfigError(f"{path.parent}: {holder(path)} is {doing} there; {remedy}") from None
        except OSError as e:
            told = f"{path.parent}: no locks on this file system ({e.strerror}); let no two write there"
            print(told, file=sys.stderr)
            break
        try:
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                break
        except FileNotFoundError:  # its last holder has just removed it
            pass
        os.close(fd)
    os.ftruncate(fd, 0)  # a killed holder's words
    os.write(fd, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
    try:
        yield
    finally:
        if os.name == "posix":  # while it is held: whoever waits for this very file sees that it is gone
            path.unlink(missing_ok=True)
        os.close(fd)


def is_alive(pid):
    """Whether a process of this number may exist here; always, where asking is not possible."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Zip files as torch.save writes them: records one after another, not compressed, each with the CRC-32 of its bytes.
# torch.load does not look at it.

SMALL = 1 << 20  # bytes: checked first, since they say what the large records are


def check_records(path, names):
    """BadZipFile if a record of a zip file is not what was written."""
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(name) as record:
                while record.read(1 << 20):
                    pass


@contextmanager
def checked_zip(path):
    """Compare every record of a zip file with its CRC-32, the large ones in threads while the body runs.

    BadZipFile before the body for damage in the small ones, for compressed ones and for sizes that are not there; after
    it for the others. Yields the bytes of all records.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    total = sum(r.file_size for r in records)
    if any(r.compress_type != zipfile.ZIP_STORED for r in records) or total > os.path.getsize(path):
        raise zipfile.BadZipFile("declares more than it holds")
    if len({r.filename for r in records}) < len(records):
        raise zipfile.BadZipFile("holds a record twice")
    check_records(path, [r.filename for r in records if r.file_size < SMALL])
    large = sorted((r for r in records if r.file_size >= SMALL), key=lambda r: -r.file_size)
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        parts = [[r.filename for r in large[n::workers]] for n in range(workers)]
        checks = [pool.submit(check_records, path, part) for part in parts if part]
        yield total
        for check in checks:
            check.result()
