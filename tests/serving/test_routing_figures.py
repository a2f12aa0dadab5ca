"""Drawings of the routing view: colours, places and weights, read back out of the SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from symphony_vlm.serving import routing_figures as figures
from symphony_vlm.serving.routing_view import LayerRouting, PatchGrid, RoutingView, Word

SVG = ElementTree.Element


def layer_of(first_experts: list[int], *, num_experts: int = 4, adjacency: torch.Tensor | None = None) -> LayerRouting:
    """Every position goes to an expert and, with a quarter of the weight, to the next one."""
    first = torch.tensor(first_experts)
    indices = torch.stack([first, (first + 1) % num_experts], dim=1)
    weights = torch.tensor([[0.75, 0.25]]).expand(len(first), 2)
    return LayerRouting(
        layer=0, num_experts=num_experts, indices_SK=indices, weights_SK=weights, adjacency_EE=adjacency
    )


def parse(svg: str) -> SVG:
    return ElementTree.fromstring(svg)


def test_each_patch_has_its_place_and_the_colour_of_its_best_expert() -> None:
    layer = layer_of([9, 0, 1, 2, 3], num_experts=10)
    grid = PatchGrid(start=1, side=2, overview_only=False)
    root = parse(figures.overlay_svg(Image.new("RGB", (100, 60)), (0, 0, 100, 60), grid, layer))
    found = [tuple(float(r.get(k) or "nan") for k in ("x", "y", "width", "height")) for r in root.iter("rect")]
    assert found == [(0, 0, 50, 30), (50, 0, 50, 30), (0, 30, 50, 30), (50, 30, 50, 30)]
    assert [r.get("fill") for r in root.iter("rect")] == [figures.expert_color(e) for e in range(4)]
    assert [text.text for text in root.iter("text")] == ["0", "1", "2", "3"]
    assert next(root.iter("title")).text == "patch 1, 1: expert 0 75%, expert 1 25%"


def test_patches_of_padding_are_left_out_and_others_end_at_the_edge() -> None:
    # A picture of 80 x 40 on a square of 80: a row of patches above and below is half padding.
    layer = layer_of([0] * 16)
    grid = PatchGrid(start=0, side=4, overview_only=False)
    root = parse(figures.overlay_svg(Image.new("RGB", (80, 40)), (0, -20, 80, 60), grid, layer))
    boxes = [tuple(float(r.get(k) or "nan") for k in ("y", "height")) for r in root.iter("rect")]
    assert boxes == [(0, 20)] * 4 + [(20, 20)] * 4
    # A crop shows less than the picture: the patches keep to its middle.
    root = parse(figures.overlay_svg(Image.new("RGB", (80, 40)), (20, 0, 60, 40), grid, layer))
    assert sorted({float(r.get("x") or "nan") for r in root.iter("rect")}) == [20, 30, 40, 50]


def test_words_are_escaped_and_coloured() -> None:
    words = (
        Word(text="<|user|>", start=0, stop=1, is_answer=False),
        Word(text=" <b>&", start=1, stop=3, is_answer=False),
        Word(text="red", start=3, stop=4, is_answer=True),
    )
    view = RoutingView(layers=(), pictures=(), words=words)
    page = figures.words_html(view, layer_of([0, 1, 1, 2]))
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;&#8288;<sub>1</sub>" in page
    colours = re.findall(r"--expert:(#\w+)", page)
    assert colours == [figures.expert_color(e) for e in (0, 1, 2)]
    assert page.count("<p class=") == 2
    many = RoutingView(layers=(), pictures=(), words=words * 400)
    assert "The first 600 words are left out" in figures.words_html(many, layer_of([0] * 4))


def test_the_legend_adds_up() -> None:
    words = (Word(text="a", start=4, stop=5, is_answer=False),)
    view = RoutingView(layers=(), pictures=(PatchGrid(start=0, side=2, overview_only=False),), words=words)
    page = figures.legend_html(view, layer_of([0, 0, 1, 1, 3]))
    rows = re.findall(r"</i>(\d)</td><td>(\d+)%</td><td>(\d+)%", page)
    assert rows == [("0", "38", "25"), ("1", "50", "0"), ("2", "12", "0"), ("3", "0", "75")]


def test_the_strongest_edges_are_drawn_as_wide_as_they_are_heavy() -> None:
    adjacency = torch.eye(4)
    adjacency[0, 1], adjacency[2, 3], adjacency[3, 2] = 0.4, 0.2, 0.0001
    assert figures.strongest_edges(adjacency, 9) == [(0, 1, pytest.approx(0.4)), (2, 3, pytest.approx(0.2))]
    assert figures.strongest_edges(adjacency, 1) == [(0, 1, pytest.approx(0.4))]
    svg = figures.graph_svg(layer_of([0], adjacency=adjacency))
    root = parse(svg)
    widths = [float(path.get("stroke-width") or "nan") for path in root.iter("path")]
    assert widths == [pytest.approx(3.3), pytest.approx(6.0)]
    assert "expert 0 listens to expert 1: 0.400" in svg
    # Four experts on a circle: top, right, bottom, left.
    places = [(float(c.get("cx") or "nan"), float(c.get("cy") or "nan")) for c in root.iter("circle")]
    assert places == [(160, 30), (290, 160), (160, 290), (30, 160)]
    assert svg == figures.graph_svg(layer_of([0], adjacency=adjacency.clone()))


def test_a_graph_of_one_expert_and_of_many() -> None:
    for size in (1, 2, 64):
        adjacency = torch.full((size, size), 1 / size)
        root = parse(figures.graph_svg(layer_of([0], num_experts=size, adjacency=adjacency)))
        assert len(list(root.iter("circle"))) == size
        assert len(list(root.iter("path"))) == min(size * (size - 1), 3 * size)
    with pytest.raises(ValueError, match="no expert graph"):
        figures.graph_svg(layer_of([0]))
