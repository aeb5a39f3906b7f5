"""
Rewrites the excerpts of --help in README.md, from what the scripts print today.

    python -m lab.readme

An excerpt is the block of lines after "`python SCRIPT --help`:". Which flags it shows is what it shows already.
"""

import re
import subprocess
import sys

import configurator
from configurator import ROOT, ConfigError
from data.files import replace_file

EXCERPT = re.compile(r"(`python (\w+\.py) --help`:\n\n```\n)(.*?)(```)", re.DOTALL)


def help_lines(script):
    """{flag: its line of --help}."""
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    return {line.split("=")[0]: line for line in done.stdout.splitlines() if line.startswith("  --")}


def rewrite(match):
    before, script, excerpt, after = match.groups()
    lines = help_lines(script)
    flags = [line.split("=")[0] for line in excerpt.splitlines()]
    if unknown := [flag for flag in flags if flag not in lines]:
        raise ConfigError(f"README.md: {script} has no{unknown[0]}; remove its line")
    return before + "".join(lines[flag] + "\n" for flag in flags) + after


def main(argv=None):
    with configurator.one_line_errors("lab.readme", OSError):
        if sys.argv[1:] if argv is None else argv:
            print(__doc__.strip())
            raise SystemExit(0)
        path = ROOT / "README.md"
        replace_file(path, EXCERPT.sub(rewrite, path.read_text(encoding="utf-8")).encode())
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
