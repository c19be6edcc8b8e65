"""The report: every figure is that of the manifest, and the page needs nothing but itself."""

from __future__ import annotations

import json
import re
import struct
import zlib
from base64 import b64decode
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from optpass.errors import OptpassError
from optpass.export import graph, patches, report
from optpass.grammar import parse
from optpass.manager import apply
from optpass.results import Fidelity, Interval, Latency, Layer, Metric, PassRecord, Probes, Timing
from optpass.runtime import manifest as manifests
from optpass.runtime import profile
from optpass.runtime.manifest import Engine, Hardware, Manifest, TensorInfo
from optpass.runtime.maps import PATH, SiteMap, TokenMaps
from tests import small
from tests.export import pages
from tests.export.pages import Page

HOSTILE = "<script>alert(1)</script>\"'&"


def around(value: float, width: float = 0.02) -> Interval:
    return Interval(value=value, low=value - width, high=value + width)


def quantiles(middle: float) -> list[float]:
    return [middle * (0.9 + 0.01 * step) for step in range(21)]


def described(**changes: Any) -> dict[str, Any]:
    """The document of a manifest made by hand, in which every text is hostile."""
    timing = [Timing(median_ms=m, p95_ms=1.1 * m, runs=9, quantiles_ms=quantiles(m)) for m in (20.5, 9.25)]
    tensor = TensorInfo(name="x", dtype="float32", shape=["n", 3])
    engine = {
        "backend": "onnxruntime",
        "precision": "f32",
        "entry": "a.onnx",
        "files": ["a.onnx"],
        "inputs": [tensor],
        "outputs": [tensor],
        "dynamic": {"n": {"minimum": 1, "maximum": 8}},
        "tolerance": 1e-6,
    }
    manifest = Manifest(
        optpass="0",
        created="today",
        source=HOSTILE,
        libraries={"torch": HOSTILE},
        hardware=Hardware(cpu=HOSTILE, flags=["avx2"], cores=2, system="Linux"),
        engines={"onnxruntime-f32": Engine(**engine)},
        default="onnxruntime-f32",
        files={"a.onnx": "0f" * 32},
        passes=[
            PassRecord(
                name="prune",
                options={"keep": 0.5, "selector": HOSTILE, "at": [1, 3]},
                sites=[HOSTILE],
                tokens=[197, "(s + 1)//2"],
                status="kept",
                probes=Probes(identity=0.0, permutation=3.25e-7),
            ),
            PassRecord(name="merge", options={}, status="refused", reason=f"[token-order] {HOSTILE}"),
        ],
        layers=[
            Layer(path=f"blocks.{i}", dense_tokens=197, tokens=197 // (i + 1), dense_flops=2e9, flops=1.5e9 / (i + 1))
            for i in range(3)
        ],
        fidelity=[
            Fidelity(engine="onnxruntime-f32", output=o, difference=2e-6, tolerance=1e-5, shapes=[{"n": 2}], ok=True)
            for o in ("logits", HOSTILE)
        ],
        metric=[
            Metric(
                engine="onnxruntime-f32",
                name="top1",
                samples=2000,
                dense=around(0.9),
                optimized=around(0.89),
                drop=around(0.01),
                label=HOSTILE,
            )
        ],
        latency=[
            Latency(
                engine="onnxruntime-f32",
                batch="8",
                dense=timing[0],
                optimized=timing[1],
                speedup=around(2.2),
                verdict="faster",
            )
        ],
        recipe=HOSTILE,
    )
    document = report.described(manifest.model_copy(update=changes))
    return {**document, "profile": {"engines": []}}


def profiled(document: dict[str, Any]) -> dict[str, Any]:
    entry = report.compared("onnxruntime-f32", {"Gemm": 3.0, "Add": 1.0}, {"Gemm": 1.0, "TopK": 0.25})
    hardware = {"cpu": HOSTILE, "cores": 2}
    return {**document, "profile": {"calls": 15, "hardware": hardware, "engines": [entry], "failed": [HOSTILE]}}


def maps() -> TokenMaps:
    """Two sites of a 2x2 image behind a class token: the last two merge, then the first of the grid is dropped."""
    one = np.ones((1, 5), np.float32)
    sites = [
        SiteMap(HOSTILE, "merge", 4, np.array([[0, 1, 2, 3, 3]], np.int32), one),
        SiteMap("blocks.1", "prune", 3, np.array([[0, -1, 1, 2, 2]], np.int32), one),
    ]
    return TokenMaps(1, 0, (2, 2), sites)


def rendered(document: dict[str, Any] | None = None) -> str:
    pixels = np.arange(3 * 8 * 8, dtype=np.float32).reshape(1, 3, 8, 8)
    return report.page(document or profiled(described()), maps(), [pixels])


def test_every_number_is_that_of_the_manifest() -> None:
    document = {**profiled(described()), "kept": patches.summary(maps())}
    found = list(Page(rendered()).fields())
    assert len(found) > 100
    for path, value, text in found:
        expected = pages.at(document, path)
        assert value == ("" if expected is None else str(expected)), path
        if isinstance(expected, float) and expected and "e" not in text:
            shown = float(re.sub(r"[x%, a-z]", "", text))
            scale = 100 if "%" in text else 1e-9 if "flops" in path and "share" not in path else 1
            assert shown == pytest.approx(expected * scale, rel=6e-3, abs=6e-3), (path, text)


def test_the_figures_that_matter_are_there() -> None:
    paths = {path for path, _, _ in Page(rendered()).fields()}
    wanted = [f"latency.0.{which}.quantiles_ms.{step}" for which in ("dense", "optimized") for step in range(21)]
    wanted += [f"latency.0.speedup.{part}" for part in ("value", "low", "high")]
    wanted += [f"metric.0.drop.{part}" for part in ("value", "low", "high")]
    wanted += [f"passes.0.probes.{probe}" for probe in ("identity", "permutation", "equivalence")]
    wanted += [f"layers.2.{name}" for name in ("dense_tokens", "tokens", "dense_flops", "flops")]
    wanted += ["passes.0.options.keep", "passes.0.tokens.0", "fidelity.1.difference", "fidelity.1.tolerance"]
    wanted += ["profile.engines.0.ops.0.dense_ms", "kept.1.samples.0.dropped", "totals.share"]
    assert set(wanted) <= paths


def test_text_of_the_model_is_escaped() -> None:
    html = rendered()
    assert "<script" not in html
    page = Page(html)
    assert not page.tagged("script", "iframe", "object")
    assert not any(name.startswith("on") for element in page.all for name in element.attributes)
    assert HOSTILE in page.tagged("title")[0].text


def test_the_page_loads_nothing() -> None:
    html = rendered()
    assert "http" not in html
    assert "url(" not in html.replace("url(#hatch)", "").replace("url(#dots)", "")
    links = [e.attributes[name] for e in Page(html).all for name in ("href", "src") if name in e.attributes]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) or link == "data:," for link in links)


def test_the_page_can_be_read_without_seeing_it() -> None:
    page = Page(rendered())
    assert page.tagged("html")[0].attributes["lang"] == "en"
    levels = [int(element.tag[1]) for element in page.tagged("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for table in page.tagged("table"):
        assert table.inside[0].tag == "caption"
    assert all(cell.attributes["scope"] in ("row", "col") for cell in page.tagged("th"))
    drawings = [e for e in page.tagged("svg") if e.attributes.get("aria-hidden") != "true"]
    assert all(e.attributes["role"] == "img" and e.attributes["aria-label"] for e in drawings)
    assert all(figure.inside[0].tag == "figcaption" for figure in page.tagged("figure"))
    names = [element.attributes["id"] for element in page.all if "id" in element.attributes]
    assert len(names) == len(set(names))
    links = [e.attributes["href"] for e in page.tagged("a", "use")]
    assert {link.removeprefix("#") for link in links} <= set(names)


def test_sections_without_content_are_left_out() -> None:
    bare = described(passes=[], layers=[], fidelity=[], metric=[], latency=[], recipe="")
    page = Page(report.page(bare))
    assert [element.attributes["id"] for element in page.tagged("h2")] == ["passes", "origin"]
    text = page.tagged("body")[0].text
    assert "speed was not measured" in text
    assert "Nothing was verified" in text
    assert "the engine is the model as it was" in text


def test_no_gain_and_failures_are_said_as_plainly_as_gains() -> None:
    document = described()
    document["latency"][0] |= {"verdict": "no gain", "speedup": {"value": 1.0, "low": 0.97, "high": 1.02}}
    document["fidelity"][1]["ok"] = False
    document["metric"][0]["drop"] = {"value": 0.01, "low": -0.01, "high": 0.03}
    text = Page(report.page(document)).tagged("header")[0].text
    assert "no gain in speed on onnxruntime-f32" in text
    assert "does not exclude 1" in text
    assert "may be chance: the interval holds 0" in text
    assert "Not faithful to eager execution: onnxruntime-f32." in text
    assert "Left out, see below: merge." in text


def test_a_timing_without_quantiles_has_no_chart() -> None:
    document = described()
    document["latency"][0]["dense"]["quantiles_ms"] = []
    page = Page(report.page(document))
    assert not [path for path, _, _ in page.fields() if "quantiles" in path]
    assert "latency.0.dense.median_ms" in {path for path, _, _ in page.fields()}


def test_dynamic_dimensions_are_part_of_the_command() -> None:
    assert "--dynamic x:0=n:1..8 --backend onnxruntime:f32" in rendered()


# pictures


def test_the_picture_marks_what_was_dropped_and_merged() -> None:
    two = maps()
    svg = str(patches.picture(two, 0, patches.tokens(two.sites[1], 0), "label", with_image=False))
    side = patches.CELL
    assert f'<path class="gone hatched" d="M0 0h{side}' in svg  # the first patch is the second token
    assert f'<path class="group g0" d="M1 {side + 1}h{side - 2}' in svg
    assert svg.count("<text") == 1
    assert ">2</text>" in svg
    assert patches.tokens(two.sites[1], 0).counts() == {
        "alone": 2, "merged": 2, "groups": 1, "largest": 2, "spread": 0, "dropped": 1,
    }  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_is_a_png_of_its_own_range(channels: int) -> None:
    pixels = np.linspace(-2, 5, channels * 6, dtype=np.float32).reshape(channels, 2, 3)
    raw = b64decode(patches.png(pixels).removeprefix("data:image/png;base64,"))
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, start = {}, 8
    while start < len(raw):
        (length,) = struct.unpack(">I", raw[start : start + 4])
        kind, data = raw[start + 4 : start + 8], raw[start + 8 : start + 8 + length]
        assert struct.unpack(">I", raw[start + 8 + length : start + 12 + length])[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        start += 12 + length
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (3, 2, 8, 0 if channels == 1 else 2, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(2, 1 + 3 * channels)
    assert not rows[:, 0].any()
    found = rows[:, 1:].reshape(2, 3, channels).transpose(2, 0, 1)
    expected = np.rint((pixels + 2) * 255 / 7)
    assert np.abs(found - expected).max() <= 1  # a value that lies between two may be rounded to either


def test_a_sequence_is_a_strip_of_all_its_tokens() -> None:
    two = maps()
    strip = TokenMaps(1, 1, None, two.sites)
    page = Page(report.page(described(), strip, []))
    assert "token of the sequence" in page.tagged("body")[0].text
    assert not page.tagged("image", "use")


# the maps


def hidden(model: small.Small, inputs: dict[str, torch.Tensor], block: int) -> list[torch.Tensor]:
    """Query, key and value ``[batch, heads, tokens, head_dim]`` of a block, computed by hand."""
    x = model.embed(inputs["x"])
    for layer in list(model.layers)[:block]:
        x = layer(x, None, model.angles, False)
    layer = model.layers[block]
    return list(layer.qkv(layer.norm1(x)).view(2, small.TOKENS, 3, small.HEADS, -1).permute(2, 0, 3, 1, 4))


def followed(passes: str) -> tuple[TokenMaps, small.Small, dict[str, torch.Tensor]]:
    program = small.program()
    made = apply(program, parse(passes))
    assert made.ok, made.records
    assert made.maps is not None
    return made.maps, small.Small(), dict(zip(("x", "lengths", "bias"), program.main.example, strict=True))


@torch.no_grad()
def test_prune_keeps_the_tokens_of_largest_norm() -> None:
    found, model, inputs = followed("prune(at=1,keep=0.5,selector=norm)")
    norms = hidden(model, inputs, 1)[2].norm(dim=-1).mean(1)[:, 1:]
    (site,) = found.sites
    assert (found.prefix, found.suffix, site.path, site.name, site.tokens) == (1, 0, "layers.1", "prune", 9)
    for sample, row in enumerate(site.place):
        largest = [0, *(1 + norms[sample].topk(8).indices.sort().values).tolist()]
        assert [token for token, place in enumerate(row) if place >= 0] == largest
        assert [place for place in row if place >= 0] == list(range(9))
    assert (site.share == (site.place >= 0)).all()


@torch.no_grad()
def test_merge_puts_the_most_similar_pairs_into_one_token() -> None:
    found, model, inputs = followed("merge(at=0,r=3)")
    keys = torch.nn.functional.normalize(hidden(model, inputs, 0)[1].mean(1), dim=-1)[:, 1:].numpy()
    (site,) = found.sites
    for sample in range(2):
        similar = keys[sample, 0::2] @ keys[sample, 1::2].T
        best = np.argsort(-similar.max(1))[:3]
        pairs = {(1 + 2 * even, 2 + 2 * int(similar[even].argmax())) for even in best.tolist()}
        members = patches.tokens(site, sample).members.values()
        assert sorted(token for group in members for token in group) == sorted({t for pair in pairs for t in pair})
        assert all(site.place[sample, a] == site.place[sample, b] for a, b in pairs)
        assert site.place[sample].max() + 1 == site.tokens == small.TOKENS - 3


def test_two_sites_are_composed() -> None:
    found, _, _ = followed("merge(at=0,r=4),prune(at=2,keep=0.5,selector=norm)")
    first, second = found.sites
    assert [site.name for site in found.sites] == ["merge", "prune"]
    for sample in range(2):
        step = {int(a): int(b) for a, b in zip(first.place[sample], second.place[sample], strict=True)}
        assert len(step) == first.tokens  # tokens in one place stay in one place
        assert all(step[int(a)] == b for a, b in zip(first.place[sample], second.place[sample], strict=True))
        kept = [step[place] for place in sorted(step) if step[place] >= 0]
        assert kept == list(range(second.tokens))  # prune keeps the order
        assert step[0] == 0  # the class token


def test_a_token_that_is_spread_keeps_a_share() -> None:
    found, _, _ = followed("transform(at=1,keep=0.5,spread=4,selector=norm)")
    (site,) = found.sites
    whole = site.share == 1
    assert (whole.sum(1) == site.tokens).all()
    assert (site.share[~whole] > 0.25 - 1e-6).all()  # the largest of four
    assert (site.share[~whole] < 1).all()


def test_token_maps_are_read_as_they_were_saved(tmp_path: Path) -> None:
    maps().save(tmp_path / "maps.npz")
    back = TokenMaps.read(tmp_path / "maps.npz")
    assert (back.prefix, back.suffix, back.grid) == (1, 0, (2, 2))
    for one, two in zip(back.sites, maps().sites, strict=True):
        assert (one.path, one.name, one.tokens) == (two.path, two.name, two.tokens)
        assert (one.place == two.place).all()
    (tmp_path / "maps.npz").write_bytes(b"nothing zipped")
    with pytest.raises(OptpassError, match="holds no token maps"):
        TokenMaps.read(tmp_path / "maps.npz")


# a whole artifact


def test_an_artifact_is_told_with_all_it_holds(reported: Path, tmp_path: Path) -> None:
    written = report.report(reported, tmp_path / "page.html")
    page = Page(written.read_text())
    sections = [element.attributes["id"] for element in page.tagged("h2")]
    assert sections == ["passes", "fidelity", "quality", "latency", "layers", "ops", "tokens", "origin"]
    manifest = json.loads((reported / "manifest.json").read_text())
    assert PATH in manifest["files"]
    own = [(p, v) for p, v, _ in page.fields() if p.partition(".")[0] in manifest]
    assert own
    assert all(value == str(pages.at(manifest, path)) for path, value in own if value)
    assert len(page.tagged("image")) == 2
    digests = [element.text for element in page.tagged("code")]
    assert set(manifest["files"].values()) <= set(digests)


def test_profiles_name_the_ops_that_engines_run(reported: Path) -> None:
    manifest = manifests.read(reported)
    for name in manifest.engines:
        times = profile.by_op(profile.profile(reported, manifest, name, threads=1, calls=3))
        assert all(milliseconds >= 0 for milliseconds in times.values())
        assert sum(times.values()) > 0
        product = {"Gemm", "MatMul", "FusedGemm"} if "onnxruntime" in name else {"FullyConnected"}
        assert product & set(times)
        assert list(times.values()) == sorted(times.values(), reverse=True)


def test_an_engine_that_does_not_open_here_is_named_and_left_out(
    reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = profile.profile

    def one_fails(folder: Path, manifest: Manifest, engine: str, **options: Any) -> Any:
        if "openvino" in engine:
            raise OptpassError("engine-machine", "no such instructions", "use another")
        return original(folder, manifest, engine, **options)

    monkeypatch.setattr(report.profiles, "profile", one_fails)
    text = report.report(reported, tmp_path / "page.html").read_text()
    assert "openvino-f32 was not profiled: no such instructions." in text
    assert "All ops of onnxruntime-f32" in text


def test_a_page_is_not_written_inside_the_artifact_nor_over_other_files(reported: Path, tmp_path: Path) -> None:
    with pytest.raises(OptpassError, match="inside the artifact"):
        report.report(reported, reported / "page.html", profile=False)
    other = tmp_path / "letter.html"
    other.write_text("dear reader")
    with pytest.raises(OptpassError, match="is there"):
        report.report(reported, other, profile=False)
    assert other.read_text() == "dear reader"
    report.report(reported, other, profile=False, force=True)
    report.report(reported, other, profile=False)  # a page of ours may be replaced
    assert [path.name for path in tmp_path.iterdir()] == ["letter.html"]


# graphs for viewers


def test_netron_gets_a_graph_without_weights(reported: Path, tmp_path: Path) -> None:
    written = graph.export(reported, tmp_path / "graph.onnx", "netron")
    model = onnx.load(written, load_external_data=False)
    assert written.stat().st_size < (reported / "onnxruntime-f32" / "model.onnx").stat().st_size / 2
    facts = [{entry.key: entry.value for entry in node.metadata_props} for node in model.graph.node]
    modules = {fact["module"] for fact in facts if "module" in fact}
    assert {"blocks.0.query", "blocks.2.narrow", "head"} <= modules
    assert sum("milliseconds" in fact for fact in facts) > 20
    assert all(float(fact["milliseconds"]) >= 0 for fact in facts if "milliseconds" in fact)
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.value_info}
    attention = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    assert shapes[attention.output[0]] == [2, 17, 32]


def check_schema(graphs: Any) -> None:
    """The form that Model Explorer reads: graphs of nodes, each with edges that come from other nodes."""
    assert set(graphs) == {"label", "graphs"}
    for one in graphs["graphs"]:
        assert set(one) == {"id", "nodes"}
        names = [node["id"] for node in one["nodes"]]
        assert len(names) == len(set(names))
        for node in one["nodes"]:
            assert all(isinstance(node[key], str) for key in ("id", "label", "namespace"))
            assert all(set(a) == {"key", "value"} and isinstance(a["value"], str) for a in node["attrs"])
            for edge in node["incomingEdges"]:
                assert set(edge) == {"sourceNodeId", "sourceNodeOutputId", "targetNodeInputId"}
                assert edge["sourceNodeId"] in names
                assert edge["sourceNodeOutputId"].isdigit()
            assert all(set(item) == {"id", "attrs"} for item in node["outputsMetadata"])


def test_model_explorer_gets_a_graph_of_modules(reported: Path, tmp_path: Path) -> None:
    written = graph.export(reported, tmp_path / "graph.json", "model-explorer", profile=False)
    found = json.loads(written.read_text())
    check_schema(found)
    (only,) = found["graphs"]
    assert {"blocks/0/query", "blocks/2", "inputs", "outputs"} <= {node["namespace"] for node in only["nodes"]}
    attributes = {a["key"]: a["value"] for node in only["nodes"] for a in node["attrs"] if node["label"] == "Conv"}
    assert attributes["op"] == "Conv"
    assert "milliseconds" not in attributes
    ends = [node for node in only["nodes"] if node["namespace"] in ("inputs", "outputs")]
    assert [node["label"] for node in ends] == ["pixels", "logits"]
    assert ends[0]["outputsMetadata"][0]["attrs"][0]["value"] == "float32[2, 3, 16, 16]"


def test_an_engine_without_an_onnx_graph_is_refused(reported: Path, tmp_path: Path) -> None:
    with pytest.raises(OptpassError, match="openvino-f32 has no ONNX graph"):
        graph.export(reported, tmp_path / "g", "netron", "openvino-f32")
    with pytest.raises(OptpassError, match="has no engine 'gone'"):
        graph.export(reported, tmp_path / "g", "netron", "gone")
    assert not any(tmp_path.iterdir())
