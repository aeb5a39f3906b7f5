"""
The page of a comparison: one HTML file that fetches nothing, for a desk and for a telephone.

Tables that a click on a header sorts and a word filters, intervals drawn beside their numbers, and for each row what
its config says it is, its commands and its records.
"""

import base64
import html
import re

from configurator import ConfigError
from data.files import replace_file

INTERVAL = re.compile(r"([+-]\d+\.\d+)(?: ± (\d+\.\d+))?")  # a difference to the baseline
HALF = 50  # pixels from zero to either end of a drawn interval

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --paper: #fff; --line: #d0d7de; --stripe: #8881; --better: #0072b2;
  --worse: #d55e00 }
@media (prefers-color-scheme: dark) { :root { --text: #d8dee6; --paper: #15181d; --line: #3a424d; --better: #56b4e9;
  --worse: #e69f00 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper); max-width: 80rem;
  margin: 1rem auto; padding: 0 1rem; overflow-wrap: anywhere }
header { position: sticky; top: 0; background: var(--paper); padding: .5rem 0; border-bottom: 1px solid var(--line);
  display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: baseline; z-index: 1 }
h1 { font-size: 1.3rem; margin: 0 } h2 { margin: 2rem 0 .5rem; font-size: 1.15rem }
input { font: inherit; padding: .2rem .5rem; width: 14rem; max-width: 100% }
.wide { overflow-x: auto } table { border-collapse: collapse; overflow-wrap: normal }
td, th { padding: .2rem .6rem; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
th { cursor: pointer; border-bottom: 2px solid var(--line); vertical-align: bottom }
th[aria-sort=ascending]::after { content: " \\25b2" } th[aria-sort=descending]::after { content: " \\25bc" }
tbody tr { border-bottom: 1px solid var(--stripe) } [hidden] { display: none }
img { max-width: 100%; background: #fff } pre { background: var(--stripe); padding: .5rem; overflow-x: auto;
  white-space: pre-wrap } a { color: var(--better) }
svg { vertical-align: middle; margin-left: .5rem; overflow: visible }
summary { cursor: pointer } details p { margin: .3rem 0 }
.legend svg { margin: 0 } #rows dt { font-weight: 600 } #rows dd { margin: 0 0 .6rem 1rem }
"""

SCRIPT = """
for (const th of document.querySelectorAll('th')) th.onclick = () => {
  const table = th.closest('table'), body = table.tBodies[0], i = th.cellIndex;
  const up = th.getAttribute('aria-sort') != 'ascending';
  for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
  th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const of = row => { const v = row.cells[i].dataset.v; return v === '' || isNaN(v) ? v : Number(v) };
  const less = (x, y) => typeof x == 'number' && typeof y == 'number' ? x - y : String(x).localeCompare(String(y));
  [...body.rows].sort((a, b) => (up ? 1 : -1) * less(of(a), of(b))).forEach(row => body.append(row));
};
const filter = document.querySelector('input'), named = document.querySelectorAll('[data-row]');
filter.oninput = () => {
  const words = filter.value.toLowerCase().split(/[ ,]+/).filter(word => word);
  for (const part of named) part.hidden = words.length > 0 && !words.some(word => part.dataset.row.includes(word));
};
"""


def drawn(text, most):
    """An interval as a picture: the mean a dot, the 95 % interval a line, zero in the middle, `most` at the ends."""
    mean, half = INTERVAL.fullmatch(text).groups()
    is_known, mean, half = half is not None, float(mean), float(half or 0)
    low, at, high = (max(-1.0, min(1.0, x / most)) * HALF + HALF for x in (mean - half, mean, mean + half))
    is_apart = is_known and abs(mean) > half
    colour = ("var(--worse)" if mean > 0 else "var(--better)") if is_apart else "inherit"
    return (
        f'<svg width="{2 * HALF}" height="12" role="img" aria-label="{html.escape(text)}" style="color: {colour}" '
        f'stroke="currentColor"><path d="M{HALF} 0V12" stroke="#8888"/><path d="M{low:.1f} 6H{high:.1f}" '
        f'stroke-width="2"/><circle cx="{at:.1f}" cy="6" r="3" stroke="none" fill="currentColor"/></svg>'
    )


def scale_of(table):
    """The size of the largest difference in a table, its interval included; 0 without any.

    A difference of more than three times the median would leave no room for the others: drawings are cut off there.
    """
    found = [INTERVAL.fullmatch(text) for cells in table for text, _ in cells.values()]
    sizes = sorted(abs(float(m[1])) + float(m[2] or 0) for m in found if m)
    return min(sizes[-1], 3 * sizes[len(sizes) // 2]) if sizes else 0.0


def html_table(table):
    """A table of cells (text, what to sort by); the first one names the row, and leads to what is said of it below."""
    most, lines = scale_of(table), []
    for cells in table:
        row, *others = cells.values()
        name = html.escape(row[0])
        line = [f'<td data-v="{name}"><a href="#row-{name}">{name}</a></td>']
        for text, value in others:
            picture = drawn(text, most) if most and INTERVAL.fullmatch(text) else ""
            line.append(
                f'<td data-v="{"" if value is None else html.escape(str(value))}">{html.escape(text)}{picture}</td>'
            )
        lines.append(f'<tr data-row="{name.lower()}">{"".join(line)}</tr>')
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table[0])
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def meaning(text):
    """What a config says it is: its first comment, or its flags where it has none."""
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    return comments[0] if comments else text.strip()


def entry(row, runs, records):
    """What the legend says of a row: its meaning; and, folded away, its config, commands, commits and records."""
    say, asked = html.escape, runs[-1].asked
    config = asked["config"]
    links = [f'<a href="{say(records)}">records</a>']
    if config.startswith("config/"):
        links.insert(0, f'<a href="../{say(config)}">{say(config)}</a>')
    lines = [f"{' '.join(run.asked['flags'])}  # {run.loss:.4f}, commit {run.facts['git_commit']}" for run in runs]
    return (
        f'<div data-row="{say(row.lower())}" id="row-{say(row)}"><dt>{say(row)}</dt><dd>{say(meaning(asked["text"]))}'
        f"<details><summary>{len(runs)} runs</summary><p>{', '.join(links)}</p>"
        f"<pre>{say(asked['text'].strip())}</pre><pre>{say(chr(10).join(lines))}</pre></details></dd></div>"
    )


def legend():
    """What the drawings of intervals mean."""
    return (
        '<p class="legend">Differences to the baseline: '
        + ", ".join(f"{drawn(text, 0.03)} {told}" for text, told in (
            ("-0.0200 ± 0.0080", "better: left of zero, and so is its whole 95 % interval"),
            ("+0.0200 ± 0.0080", "worse"), ("+0.0050 ± 0.0150", "not told apart"), ("+0.0050", "one seed")))
        + ". The intervals are not corrected for the number of rows; the verdicts are.</p>"
    )  # fmt: skip


def page(name, intro, parts, plots, rows, failed, records):
    """
    The page, as text. parts: (title, remark, table); plots: {name: PNG}; rows: {row: its finished runs}; failed: texts
    on failed runs; records: the path of the records, from where the page lies.
    """
    say = html.escape
    body = [
        f'<header><h1>{say(name)}</h1><input type="search" placeholder="filter rows: fhn bio" aria-label="filter rows">'
        '<a href="#legend">what each row is</a></header>',
        "<p>A click on a header sorts; a row's name leads to its config, commands and records.</p>",
        legend() if any(map(scale_of, (table for *_, table in parts))) else "",
        f"<details><summary>How it was run</summary><p>{say(intro)}</p></details>",
    ]
    for title, remark, table in parts:
        long = f"<details><summary>notes</summary><p>{say(remark)}</p></details>" if remark else ""
        body.append(f"<h2>{say(title)}</h2>{long}{html_table(table)}")
    for alt, data in plots.items():
        body.append(f'<p><img alt="{say(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>')
    body += [f"<h2>Failed</h2><p>{say('; '.join(failed))}</p>"] if failed else []
    entries = "".join(entry(row, runs, records) for row, runs in rows.items())
    body.append(f'<h2 id="legend">What each row is</h2><dl id="rows">{entries}</dl>')
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{say(name)}</title>'
    )
    return f"{head}<style>{STYLE}</style></head>\n<body>{chr(10).join(body)}<script>{SCRIPT}</script></body></html>\n"


def write_between_marks(path, name, text):
    """Replace what is between <!-- NAME:start --> and <!-- NAME:end -->, or add both at the end."""
    first, last = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if (first in old) != (last in old):
        raise ConfigError(f"{path}: has only one of the marks {first} and {last}: mend it by hand")
    if first not in old:
        old = f"{old.rstrip()}\n\n{first}\n{last}\n".lstrip()
    before, after = old.split(first)[0], old.split(last)[1]
    replace_file(path, f"{before}{first}\n\n{text}\n\n{last}{after}".encode())
