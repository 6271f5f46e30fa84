"""The tables of docs/runtimes.md, from the cells of benchmarks/results/runtimes.json."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from exported import FILES, NETS, File
from runtimes import PASSES, RUNTIMES

from deploynorm.contract import LOWERINGS

__all__ = ["BEGIN", "END", "fill", "tables"]

BEGIN, END = "<!-- written by tests/runtimes -->", "<!-- end of what tests/runtimes writes -->"

Cells = Mapping[str, Mapping[str, Any]]
"""By the name of the file."""

COLUMNS = list(dict.fromkeys((file.net, file.lowering) for file in FILES))
DTYPES = list(dict.fromkeys(file.dtype for file in FILES))
SIZES = list(dict.fromkeys(file.size for file in FILES))


class _Reasons:
    """Numbers the reasons as they come, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers) + 1)

    def lines(self) -> list[str]:
        """As code, without what would end it or would be read as a link."""
        shown = (text.replace("`", "'").replace("](", "] (") for text in self.numbers)
        return [f"{number}. `{text}`" for number, text in enumerate(shown, 1)]


def good(cell: Mapping[str, Any] | None) -> bool:
    return cell is not None and not cell.get("wrong") and "refused" not in cell


def _number(error: float) -> str:
    return f"{error:.0e}".replace("e-0", "e-").replace("e+00", "")


def _one(cell: Mapping[str, Any] | None, reasons: _Reasons) -> str:
    if cell is None:
        return "not run"
    if cell.get("wrong"):
        return f"**WRONG: {cell.get('refused') or format(cell['error'], '.2g')}**"
    if "refused" in cell:
        return f"no ({reasons.number(cell['refused'])})"
    return str(cell["text"]) if "text" in cell else _number(cell["error"])


def _both(cells: Mapping[str, Mapping[str, Any] | None], reasons: _Reasons) -> str:
    """The cells of the two sizes in one: the worse number where both are right."""
    if all(good(cell) and "error" in (cell or {}) for cell in cells.values()):
        return _number(max(cell["error"] for cell in cells.values() if cell is not None))
    texts = {size: _one(cell, reasons) for size, cell in cells.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{size} {text}" for size, text in texts.items())


def advice(cells: Cells) -> str:
    """The lowering of which all files of the FRN networks are right, the default before others, of which that with the
    lowest opset; or else those files that are of one type, or of fixed sizes.
    """
    first, *others = LOWERINGS
    lowerings = [first, *sorted(others, key=lambda name: LOWERINGS[name].min_opset)]
    limits: list[tuple[str, list[str], list[str]]] = [
        ("", DTYPES, SIZES),
        (" in float32", ["float32"], SIZES),
        (", fixed sizes", DTYPES, ["fixed"]),
        (" in float32, fixed sizes", ["float32"], ["fixed"]),
    ]
    nets = [name for name, net in NETS.items() if net.frn]
    for (text, dtypes, sizes), lowering in itertools.product(limits, lowerings):
        if all(good(cells.get(str(File(*each)))) for each in itertools.product(nets, [lowering], dtypes, sizes)):
            return f"{lowering}{text}"
    return "none"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *map(list, rows))]


def tables(record: Mapping[str, Cells]) -> str:
    """All tables, with the reasons beneath them."""
    reasons = _Reasons()
    lines: list[str] = []
    rows = [row for row in RUNTIMES if row.takes == "files" and row.title in record]
    titles = [f"{NETS[net].title}, {lowering}" if NETS[net].frn else NETS[net].title for net, lowering in COLUMNS]
    for dtype in DTYPES:
        lines += [f"### {dtype}", ""]
        head = ["runtime", *titles, *(["take"] if dtype == DTYPES[0] else [])]
        body = []
        for row in rows:
            cells = record[row.title]
            texts = [
                _both({size: cells.get(str(File(net, lowering, dtype, size))) for size in SIZES}, reasons)
                for net, lowering in COLUMNS
            ]
            body.append([row.title, *texts, *([advice(cells)] if dtype == DTYPES[0] else [])])
        lines += [*_table(head, body), ""]
    if converters := [row for row in RUNTIMES if row.takes == "networks" and row.title in record]:
        body = [[row.title, *(_one(record[row.title].get(net), reasons) for net in NETS)] for row in converters]
        lines += ["### Converters of the network itself", ""]
        lines += [*_table(["converter", *(net.title for net in NETS.values())], body), ""]
    if any(name in record for name in PASSES):
        body = []
        for name in PASSES:
            for file, cell in record.get(name, {}).items():
                body.append([name, NETS[file.partition(".")[0]].title, _one(cell, reasons), cell.get("note", "")])
        lines += ["### Other tools over the default file", "", *_table(["tool", "network", "error", "left"], body), ""]
    if reasons.numbers:
        lines += ["### Reasons", "", *reasons.lines(), ""]
    if remarks := [f"- {row.title}: {row.remark}." for row in RUNTIMES if row.remark and row.title in record]:
        lines += ["### Remarks", "", *remarks, ""]
    return "\n".join(lines)


def fill(page: Path, record: Mapping[str, Cells]) -> None:
    """Writes the tables between the marks of the page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables(record)}{END}{after}", encoding="utf-8")
