"""The picture of a plan as SVG: a strip for each kind of layers, in it every norm and where its gain goes.

Nothing in it acts or comes from elsewhere, and the same plan gives the same bytes. There is no font here to ask how
wide a text is: widths are estimated, on the safe side.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flashnorm_cli.checkpoint.names import grouped
from flashnorm_cli.checkpoint.places import last_part
from flashnorm_cli.plan.model import Norm, Plan
from flashnorm_cli.report.formats import count, printable
from flashnorm_cli.report.strips import Row, Strip, Target, ranges, strips

WIDTH = 600  # of the file: as wide as a column of text, and still readable when a phone shrinks it
NARROW, BESIDE = 480, 0.42  # where tensors stand below their norms: in narrow pictures, and where names take more of it
MOST_STRIPS = 40  # the rest of a model whose layers all differ is told about, not drawn for meters
MOST_LINES = 3  # of a reason, or of a list of names; the whole is shown where the mouse rests
CODE, PROSE = 7.5, 6.6  # advance of a letter at most: 12 px monospace of any system; 12 px sans-serif, on average
PAD, GAP, LINE, CHIP, ARROW = 12, 6, 17, 22, 34
STYLE = """
.fn text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;fill:#1a1e23}
.fn .code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.fn .head{font-size:15px;font-weight:600}.fn .bold{font-weight:600}.fn .soft{fill:#545d67}
.fn rect,.fn path{fill:none;stroke:#c9d0d7}.fn .paper{fill:#fff}.fn .strip{fill:#f3f5f7;stroke:none}
.fn .norm{fill:#005ea8;stroke:#005ea8}.fn .norm~text{fill:#fff}.fn .kept{stroke:#545d67;stroke-dasharray:4 3}
.fn .flow{stroke:#005ea8;stroke-width:1.5}.fn .tensor{fill:#fff;stroke:#005ea8}
.fn .all{fill:#d0d6dc;stroke:none}.fn .here{fill:#1a1e23;stroke:none}
@media screen and (prefers-color-scheme:dark){.fn text{fill:#e9ecef}.fn .soft{fill:#a9b3bd}
.fn rect,.fn path{stroke:#434b54}.fn .paper{fill:#1a1e22}.fn .strip{fill:#23282e}
.fn .norm{fill:#6bb8ff;stroke:#6bb8ff}.fn .norm~text{fill:#0b1a28}.fn .kept{stroke:#a9b3bd}
.fn .flow{stroke:#6bb8ff}.fn .tensor{fill:#1a1e22;stroke:#6bb8ff}
.fn .all{fill:#434b54}.fn .here{fill:#e9ecef}}
""".replace("\n", "")


def plan_svg(plan: Plan, width: int = WIDTH) -> str:
    """The picture as a file that stands on its own, on paper of its own: light, or dark where the reader prefers it.

    Args:
        plan: of a checkpoint, or from the record of a folded one.
        width: in pixels; the height follows from the plan.
    """
    picture = _Picture(plan, width, PAD)
    picture.header()
    picture.body()
    svg = picture.finished()
    svg.set("width", str(width))
    svg.set("height", svg.get("viewBox", "").rpartition(" ")[2])
    paper = ET.Element("rect", {"class": "paper", "x": ".5", "y": ".5", "rx": "8"})
    paper.set("width", str(width - 1))
    paper.set("height", str(float(svg.get("height", "1")) - 1))
    svg.insert(1, paper)
    return f"{_text(svg)}\n"


def plan_drawing(plan: Plan, width: int, name: str) -> str:
    """The same as a part of a page that has said already which model it is; `name` is a class of the element."""
    picture = _Picture(plan, width, 0)
    picture.body()
    svg = picture.finished()
    svg.set("class", f"fn {name}")
    return _text(svg)


def _text(svg: ET.Element) -> str:
    return ET.tostring(svg, encoding="us-ascii").decode("ascii")  # the same on a terminal of any encoding


@dataclass(frozen=True)
class _Box:
    """A norm or a tensor: `text` in a frame `width` wide, `hint` where the mouse rests."""

    kind: str
    text: str
    hint: str

    @property
    def width(self) -> float:
        return len(self.text) * CODE + 18


class _Picture:
    """A column of strips, drawn from the top: everything is drawn at `y`, and moves it down."""

    def __init__(self, plan: Plan, width: int, margin: int) -> None:
        self.plan, self.strips = plan, strips(plan)
        self.left, self.right, self.y = float(margin), float(width - margin), float(max(margin, 1))
        self.svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "fn", "role": "img"})
        self.svg.set("aria-label", _words(_summary(plan)))
        ET.SubElement(self.svg, "style").text = STYLE
        self.narrow = width < NARROW
        self.inner = self.right - self.left - 2 * PAD
        beside = [wide for strip in self.strips if (wide := self.widest(strip)) <= self.inner * BESIDE]
        self.column = self.left + PAD + max(beside, default=0.0) + ARROW

    def finished(self) -> ET.Element:
        self.svg.set("viewBox", f"0 0 {_px(self.right + self.left)} {_px(self.y + self.left)}")
        return self.svg

    def widest(self, strip: Strip) -> float:
        return max(_norm_box(row, int(self.inner / CODE) - 3).width for row in strip.rows)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def header(self) -> None:
        """Which model, and in a line what becomes of its norms."""
        source = self.plan.source
        name = source if self.plan.commit is not None else last_part(source)
        self.y += 6
        self.lines([name], "head", self.left + 2, 9.0, 20)
        self.lines([_summary(self.plan)], "soft", self.left + 2, PROSE, LINE)
        self.y += 10

    def body(self) -> None:
        """The legend, the strips, and what was left alone."""
        self.legend()
        several = {strip.name for strip in self.strips if strip.name and strip.numbers != strip.every}
        for strip in self.strips[:MOST_STRIPS]:
            self.strip(strip, strip.name in several)
            self.y += 8
        below = []
        if len(self.strips) > MOST_STRIPS:
            below.append(f"{len(self.strips) - MOST_STRIPS} more kinds of layers are not drawn")
        rotation = self.plan.rotation
        if rotation:
            size = f"{rotation.kind}, {rotation.size} channels, seed {rotation.seed}"
            below.append(f"The residual stream is rotated ({size}) in {len(rotation.tensors)} tensors")
        for what, names in (
            ("Not reached by a text forward, left alone", self.plan.not_traced),
            ("On disk but not read by the model, left alone", self.plan.unread),
        ):
            if names:
                patterns = grouped(name.removesuffix(".weight") for name in names)
                listed = (f"{pattern} ({number})" if number > 1 else pattern for pattern, number in patterns)
                below.append(f"{what}: {', '.join(listed)}")
        for text in below:
            self.lines([text], "soft", self.left + 2, PROSE, LINE)
        self.y += 2 if below else -8

    def legend(self) -> None:
        """What the shapes mean; only for those that there are."""
        x = self.left + 2
        if self.plan.folded:
            x += self.box(self.svg, x, _Box("norm", "norm", "")) + 4
            self.arrow(x, x + 22)
            x += 26
            x += self.box(self.svg, x, _Box("tensor", "tensor", "")) + 6
            self.text(self.svg, x, "folded", "soft")
            x += 6 * PROSE + 22
        if self.plan.kept:
            x += self.box(self.svg, x, _Box("kept", "norm", "")) + 6
            self.text(self.svg, x, "kept", "soft")
        self.y += CHIP + 10 if self.plan.norms else 0

    def strip(self, strip: Strip, barcode: bool) -> None:
        """One kind of layers, on a ground of its own."""
        ground = ET.SubElement(self.svg, "rect", {"class": "strip", "rx": "6"})
        top, x, end = self.y, self.left + PAD, self.right - PAD
        self.y += 7
        if strip.name or strip.numbers:
            number = f"{len(strip.numbers)} of {len(strip.every)}" if barcode else str(len(strip.every))
            right = f"{number} layer{'' if number == '1' else 's'}"
            room = int((end - x - len(right) * PROSE - 8) / CODE)
            numbers = ranges(strip.numbers)
            name = _fit(strip.name, max(room - len(numbers) - 1, 8), keep_end=True)
            group = self.group(f"{strip.name} {ranges(strip.numbers, most=None)}")
            self.text(group, x, _fit(f"{name} {numbers}".strip(), room), "code bold")
            self.text(group, end, right, "soft", anchor="end")
            self.y += CHIP + 1
            if barcode:
                self.barcode(strip, x, end)
        below = self.narrow or self.widest(strip) > self.inner * BESIDE
        for row in strip.rows:
            self.row(row, x, end, below)
        self.y += 1
        for key, value in (("x", self.left), ("y", top), ("width", self.right - self.left), ("height", self.y - top)):
            ground.set(key, _px(value))

    def barcode(self, strip: Strip, x: float, end: float) -> None:
        """Which of the layers these are: a bar with a field for each."""
        step = min((end - x) / len(strip.every), 14.0)
        numbers, gap = set(strip.numbers), 1.0 if step > 3 else 0.0
        for kind, wanted in (("all", False), ("here", True)):
            fields = [
                f"M{_px(x + i * step)},{_px(self.y)}h{_px(step - gap)}v5h{_px(gap - step)}z"
                for i, number in enumerate(strip.every)
                if (number in numbers) == wanted
            ]
            ET.SubElement(self.svg, "path", {"class": kind, "d": "".join(fields)})
        self.y += 12

    def row(self, row: Row, x: float, end: float, below: bool) -> None:
        """A norm with what takes its gain, or with the reason why it stays; beside it, or `below` it."""
        group = self.group(_norm_hint(row))
        width = self.box(group, x, _norm_box(row, int((end - x) / CODE) - 3))
        column = x + ARROW + 8 if below else self.column
        if below:
            self.y += CHIP + 4
        if row.reason is not None:
            self.lines([f"kept: {row.reason}"], "soft", column, PROSE, LINE, group)
            self.y += 10
            return
        if below:
            self.elbow(x + 16, column - 5)
        else:
            self.arrow(x + width + 3, column - 5)
        self.targets(row, column, end)
        self.y += CHIP + 7

    def targets(self, row: Row, column: float, end: float) -> None:
        """Tensors by their modules, in as many lines as it takes."""
        room = int((end - column) / CODE)
        for line, (module, targets) in enumerate(row.into):
            self.y += (CHIP + 4) if line else 0
            x = column
            if module:
                prefix = _fit(f"{module}.", max(room - len(targets[0].leaf) - 4, room // 2), keep_end=True)
                self.text(self.svg, x, prefix, "code soft")
                x += len(prefix) * CODE + 2
            for target in targets:
                box = _tensor_box(target, int((end - x) / CODE) - 3 if target is targets[0] else room - 3)
                if x > column and x + box.width > end and target is not targets[0]:
                    x, self.y = column, self.y + CHIP + 4
                x += self.box(self.group(box.hint), x, box) + GAP

    # ---- marks ---------------------------------------------------------------------------------------------------

    def group(self, hint: str) -> ET.Element:
        group = ET.SubElement(self.svg, "g")
        ET.SubElement(group, "title").text = _words(hint)
        return group

    def box(self, parent: ET.Element, x: float, box: _Box) -> float:
        """Draw a box with its text; returns its width."""
        place = {"x": _px(x), "y": _px(self.y), "width": _px(box.width), "height": str(CHIP)}
        parent = ET.SubElement(parent, "g")
        ET.SubElement(parent, "rect", {"class": box.kind, **place, "rx": "4" if box.kind == "tensor" else "11"})
        self.text(parent, x + box.width / 2, box.text, "code", anchor="middle")
        return box.width

    def arrow(self, x: float, end: float) -> None:
        middle = self.y + CHIP / 2
        ET.SubElement(self.svg, "path", {"class": "flow", "d": f"M{_px(x)},{_px(middle)}H{_px(end)}m-5,-4l5,4l-5,4"})

    def elbow(self, x: float, end: float) -> None:
        """An arrow from the box above to the line below it."""
        middle = self.y + CHIP / 2
        d = f"M{_px(x)},{_px(self.y - 3)}V{_px(middle)}H{_px(end)}m-5,-4l5,4l-5,4"
        ET.SubElement(self.svg, "path", {"class": "flow", "d": d})

    def text(self, parent: ET.Element, x: float, text: str, kind: str, anchor: str = "") -> None:
        """One line, its middle at that of a box at `y`."""
        element = ET.SubElement(parent, "text", {"class": kind, "x": _px(x), "y": _px(self.y + CHIP / 2 + 4)})
        if anchor:
            element.set("text-anchor", anchor)
        element.text = _words(text)

    def lines(
        self, texts: Iterable[str], kind: str, x: float, advance: float, height: float, parent: ET.Element | None = None
    ) -> None:
        """Prose in lines as wide as there is room."""
        room = max(int((self.right - PAD - x) / advance), 12)
        for text in texts:
            wrapped = list(_wrapped(_words(text), room))
            into = parent if parent is not None else self.svg
            if len(wrapped) > MOST_LINES:
                wrapped[MOST_LINES - 1 :] = [_fit(" ".join(wrapped[MOST_LINES - 1 :]), room)]
                into = parent if parent is not None else self.group(text)
            for line in wrapped:
                self.text(into, x, line, kind)
                self.y += height


# ---- words -----------------------------------------------------------------------------------------------------------


def _summary(plan: Plan) -> str:
    folded, norms, tensors = len(plan.folded), len(plan.norms), len(plan.readers)
    what = f"{count(folded)} of {count(norms)} norms are folded into {count(tensors)} tensors"
    return f"{plan.architecture}: {what}"


def _norm_box(row: Row, most: int) -> _Box:
    gain = "" if row.gain == "w" else f" ({row.gain})"
    return _Box("norm" if row.reason is None else "kept", _fit(row.name, max(most - len(gain), 8)) + gain, "")


def _norm_hint(row: Row) -> str:
    norm: Norm = row.norms[0]
    size = " x ".join(map(str, norm.shape))
    lines = [_and_more([each.tensor for each in row.norms]), f"{size} elements, gain {row.gain}"]
    if norm.folded:
        tensors = {reader for each in row.norms for reader in each.readers}
        lines.append(f"folded into {count(len(tensors))} tensors, then it is {norm.identity:g}")
    else:
        lines.append(f"kept: {norm.reason}")
    return "\n".join(lines)


def _tensor_box(target: Target, most: int) -> _Box:
    lines = [_and_more(target.tensors)]
    if target.dims:
        lines.append(f"scaled along dimension {', '.join(map(str, target.dims))}")
    if target.added:
        lines.append("added: the source has no such tensor")
    mark = " (new)" if target.added else ""
    return _Box("tensor", _fit(target.leaf, max(most - len(mark), 6)) + mark, "\n".join(lines))


def _and_more(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {count(len(rest))} more" if rest else first


def _words(text: str) -> str:
    """Text that a picture may hold: no characters that XML forbids, no backticks around names."""
    lines = (" ".join(line.split()) for line in str(printable(text)).replace("`", "").split("\n"))
    return "\n".join(lines)


def _fit(text: str, most: int, keep_end: bool = False) -> str:
    if len(text) <= most:
        return text
    return f"…{text[1 - most :]}" if keep_end else f"{text[: most - 1]}…"


def _wrapped(text: str, room: int) -> Iterator[str]:
    """Lines of at most `room` letters; a longer word is cut where it has to be."""
    line = ""
    for word in text.split():
        while len(word) > room:
            free = room - len(line) - 1 if line else room
            if free > 8:
                line, word = f"{line} {word[:free]}".strip(), word[free:]
            yield line
            line = ""
        if line and len(line) + 1 + len(word) > room:
            yield line
            line = ""
        line = f"{line} {word}".strip()
    if line:
        yield line


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
