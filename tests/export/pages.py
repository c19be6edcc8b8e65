"""An artifact with all that a report tells of, and a reader of its page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optpass import api
from tests.export.models import WIDTH, Block

PASSES = "merge(at=0,r=3),prune(at=1,keep=0.5,selector=norm)"


class Patches(nn.Module):
    """A vision transformer on 16 patches and a class token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x[:, 0])}


def write(out: Path) -> Path:
    torch.manual_seed(1)
    source = (Patches().eval(), (), {"pixels": torch.randn(2, 3, 16, 16)})
    made = api.optimize(source, PASSES, backend=["onnxruntime", "openvino"], out=out, seconds=0.2)
    assert made.ok, made
    return out


@dataclass
class Element:
    """An element with its attributes and all text inside it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list[Element] = field(default_factory=list)


class Page(HTMLParser):
    """A page, parsed; void elements and those of SVG that close themselves hold nothing."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.all: list[Element] = []
        self.open: list[Element] = []
        self.feed(html)
        assert not self.open, [element.tag for element in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.all.append(element)
        if self.open:
            self.open[-1].inside.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def tagged(self, *tags: str) -> list[Element]:
        return [element for element in self.all if element.tag in tags]

    def fields(self) -> Iterator[tuple[str, str, str]]:
        """Place in the document, exact value and text of each number."""
        for element in self.all:
            if "data-field" in element.attributes:
                yield element.attributes["data-field"], element.attributes["data-value"], element.text


def at(document: Any, path: str) -> Any:
    """What stands at a place of a document."""
    for step in path.split("."):
        document = document[int(step)] if isinstance(document, list) else document[step]
    return document
