"""
Compile the Triton kernels for GPUs that need not be there, and show what ptxas reports for each.

    python kernels/aot.py                                # the usual variants, for A100 and H100
    python kernels/aot.py --kernels="dkv D=64" --arch=90  # rows whose name contains all these words
    python kernels/aot.py --full                         # every variant, a quarter of an hour

Registers and spilled bytes are per thread, shared memory is in bytes per program. The last line is JSON. Exit status 1
if a kernel spills, or asks for more shared memory than the GPU has.

A module in kernels/ is included if it has `aot_rows(full)`, which gives (name, kernel, signature, constexprs,
num_warps, num_stages) for each variant that it may launch: the usual ones, or all of them with full=True.
"""

import contextlib
import importlib
import io
import json
import pkgutil
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root, from any working directory

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import configurator  # noqa: E402

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes that a program may have: A100, H100
PTXAS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers")


@dataclass
class AotConfig:
    """What to compile."""

    # -- kernels ------------------------------------------------------------------------------------------------------
    kernels: str = ""  # words that a row's name must contain, such as "forward bfloat16"; empty = all
    arch: str = "80,90"  # compute capabilities, comma-separated
    full: bool = False  # every variant instead of the usual ones

    def __post_init__(self):
        if not self.targets or not set(self.targets) <= {str(a) for a in SHARED_LIMIT}:
            raise ValueError(f"arch={self.arch!r}: must be among {', '.join(map(str, SHARED_LIMIT))}")

    @property
    def targets(self):
        return [a.strip() for a in self.arch.split(",") if a.strip()]


def rows(full):
    """The rows of every module in kernels/ that has `aot_rows`."""
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"kernels.{found.name}")
        if hasattr(module, "aot_rows"):
            yield from module.aot_rows(full)


def measure(kernel, signature, constexprs, num_warps, num_stages, arch):
    """{registers, spill, shared} of one kernel. Pointers are taken as aligned to 16 bytes: PyTorch's are."""
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in pointers})
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        options = {"num_warps": num_warps, "num_stages": num_stages}
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    stores, loads, registers = map(int, PTXAS.search(log.getvalue()).groups())
    return {"registers": registers, "spill": stores + loads, "shared": binary.metadata.shared}


def main():
    with configurator.one_line_errors("aot.py"):
        config = configurator.read(sys.argv[1:], AotConfig, doc=__doc__).build(AotConfig)
        words = set(config.kernels.split())
        chosen = [row for row in rows(config.full) if words <= set(row[0].split())]
        if not chosen:
            raise configurator.ConfigError(f"no kernel has all of {config.kernels!r} in its name")
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a kernel from the cache has no log
    results, bad = [], 0
    print(f"{'kernel':<44} {'arch':>5} {'warps':>5} {'stages':>6} {'regs':>4} {'spill':>5} {'shared':>7}")
    for name, kernel, signature, constexprs, num_warps, num_stages in chosen:
        for arch in map(int, config.targets):
            found = measure(kernel, signature, constexprs, num_warps, num_stages, arch)
            wrong = found["spill"] > 0 or found["shared"] > SHARED_LIMIT[arch]
            bad += wrong
            results.append({"kernel": name, "arch": arch, "warps": num_warps, "stages": num_stages} | found)
            print(
                f"{name:<44} sm_{arch} {num_warps:>5} {num_stages:>6} {found['registers']:>4} {found['spill']:>5}"
                f" {found['shared']:>7}{'  <- too much' if wrong else ''}",
                flush=True,
            )
    print(f"{len(results)} compiled, {bad} with spills or too much shared memory")
    print(json.dumps({"compiled": len(results), "bad": bad, "rows": results}))
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
