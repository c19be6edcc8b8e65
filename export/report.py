"""The report: one HTML page that people read, made from an artifact. It loads nothing and runs no script.

Every number is written by ``Fields`` from its place in the document, which is the manifest and, beside it, what is
counted and measured when the page is made; the place stands with the number, so that a page can be held against them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

import optpass
from optpass import files
from optpass.errors import OptpassError
from optpass.export import figures, patches
from optpass.measure import pairs
from optpass.results import Probes
from optpass.runtime import check, choice
from optpass.runtime import manifest as manifests
from optpass.runtime import maps as token_maps
from optpass.runtime import profile as profiles
from optpass.runtime.engines.base import Array
from optpass.runtime.manifest import Engine, Manifest
from optpass.runtime.maps import TokenMaps

TEMPLATE = "report.html.j2"
GENERATOR = b'<meta name="generator" content="optpass report">'
"""What the first bytes of a page hold, by which one that may be replaced is known."""

OPS = 8
"""Ops of a chart."""
SITES = 4
"""Sites whose tokens are drawn, of each sample."""

Progress = Callable[[str], None]


def report(
    folder: Path,
    out: Path | None = None,
    *,
    profile: bool = True,
    force: bool = False,
    progress: Progress = lambda text: None,
) -> Path:
    """Write the page of an artifact and return its path.

    Args:
        folder: the artifact.
        out: the file; by default the name of the artifact with ``.html``, beside it.
        profile: run the engines to see where their time goes.
        force: replace a file that is no report.
        progress: called with each step.

    Raises:
        OptpassError: no artifact, a file that may not be replaced or cannot be written.
    """
    target = destination(folder, out, ".html")
    check_target(target, folder, force or _is_report(target))
    manifest = manifests.read(folder)
    document = {**described(manifest), "profile": _profile(folder, manifest, progress) if profile else {"engines": []}}
    maps = TokenMaps.read(folder / token_maps.PATH) if token_maps.PATH in manifest.files else None
    progress("write the page")
    files.write(target, page(document, maps, _examples(folder, manifest)).encode())
    return target


def destination(folder: Path, out: Path | None, suffix: str) -> Path:
    """Where a file made from an artifact goes: beside it, under its name, unless ``out`` says otherwise."""
    whole = Path(os.path.abspath(folder))
    return Path(os.path.abspath(out)) if out is not None else whole.with_name(whole.name + suffix)


def check_target(target: Path, folder: Path, force: bool) -> None:
    """Refuse a target inside the artifact, whose files are hashed, a directory, and a file that is there."""
    if Path(os.path.realpath(folder)) in Path(os.path.realpath(target)).parents:
        raise OptpassError("output", f"{target} is inside the artifact", "give an output beside it")
    if target.is_dir():
        raise OptpassError("output", f"{target} is there and is a directory", "give the name of a file")
    if os.path.lexists(target) and not force:
        raise OptpassError("output", f"{target} is there", "give another output, or --force to replace it")


def _is_report(target: Path) -> bool:
    try:
        with target.open("rb") as file:
            return GENERATOR in file.read(1024)
    except OSError:
        return False


def _examples(folder: Path, manifest: Manifest) -> list[Array]:
    try:
        return list(check.read(folder, manifest, manifest.default).example.values())
    except OptpassError:  # an artifact without recorded outputs has all but the images
        return []


# what the page tells of


def described(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain values, and the sums over its layers."""
    document = manifest.model_dump(mode="json")
    before, after = (sum(layer[name] for layer in document["layers"]) for name in ("dense_flops", "flops"))
    share = after / before if before else 1.0
    for row, one in zip(document["accepted"], manifest.accepted, strict=True):
        row["tokens_per_step"] = one.tokens_per_step
    return {**document, "totals": {"dense_flops": before, "flops": after, "share": share}}


def _profile(folder: Path, manifest: Manifest, progress: Progress) -> dict[str, Any]:
    engines, failed = [], []
    for name, dense in pairs(manifest).items():
        if rows := choice.unrun(manifest, [name, dense]):
            failed.append(f"{name} was not profiled: {rows[0].engine} {rows[0].why}.")
            continue
        progress(f"profile {name}")
        try:
            both = [profiles.by_op(profiles.profile(folder, manifest, which)) for which in (dense, name)]
        except OptpassError as error:
            failed.append(f"{name} was not profiled: {error.refusal.what}.")
            continue
        engines.append(compared(name, *both))
    machine = manifests.hardware().model_dump(mode="json")
    return {"calls": profiles.CALLS, "hardware": machine, "engines": engines, "failed": failed}


def compared(engine: str, dense: Mapping[str, float], optimized: Mapping[str, float]) -> dict[str, Any]:
    """The time of each op of two engines, those that take most of either first; None where an engine has no such op."""
    totals = sum(dense.values()), sum(optimized.values())
    rows = []
    for op in sorted({*dense, *optimized}, key=lambda op: (-max(dense.get(op, 0), optimized.get(op, 0)), op)):
        row: dict[str, Any] = {"op": op}
        for which, times, total in zip(("dense", "optimized"), (dense, optimized), totals, strict=True):
            time = times.get(op)
            row |= {f"{which}_ms": time, f"{which}_share": None if time is None else time / max(total, 1e-12)}
        rows.append(row)
    return {"engine": engine, "dense_ms": totals[0], "optimized_ms": totals[1], "ops": rows}


# how the page tells it


@dataclass(frozen=True)
class Fields:
    """Numbers of a document as text that carries its place there, ``latency.0.speedup.value``, and the exact value."""

    document: Mapping[str, Any]

    def value(self, path: str) -> Any:
        """What stands at a place."""
        found: Any = self.document
        for step in path.split("."):
            found = found[int(step)] if isinstance(found, list) else found[step]
        return found

    def html(self, path: str, form: str = "", unit: str = "") -> Markup:
        """The number for a paragraph or a table cell."""
        return self._in("span", path, form, unit)

    def svg(self, path: str, form: str = "", unit: str = "") -> Markup:
        """The number for the text of a chart."""
        return self._in("tspan", path, form, unit)

    def _in(self, tag: str, path: str, form: str, unit: str) -> Markup:
        value = self.value(path)
        text = "-" if value is None else _formatted(value, form) + unit
        told = "" if value is None else value
        return Markup('<{0} data-field="{1}" data-value="{2}">{3}</{0}>').format(Markup(tag), path, told, text)


def _formatted(value: Any, form: str) -> str:
    if isinstance(value, str) or not form:
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if form == "giga":
        return f"{value / 1e9:.3g}"
    if form == "percent":
        return f"{value:.1%}"
    return format(value, form) if value or "e" not in form else "0"


def page(document: Mapping[str, Any], maps: TokenMaps | None = None, inputs: Sequence[Array] = ()) -> str:
    """The page of a document; ``inputs`` are the recorded example, in which the image is looked for."""
    import jinja2

    document = {**document, "kept": patches.summary(maps) if maps else []}
    fields = Fields(document)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optpass.export", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = _pictures(maps, inputs) if maps else None
    shown = {
        "passes": "Passes",
        "fidelity": "Engines against the program" if document["fidelity"] else "",
        "quality": "Quality" if document["metric"] else "",
        "latency": "Latency" if document["latency"] else "",
        "accepted": "Drafts that were right" if document["accepted"] else "",
        "layers": "Tokens and work per layer" if document["layers"] else "",
        "ops": "Time per op" if document["profile"]["engines"] else "",
        "tokens": "Which tokens were kept" if pictures else "",
        "unrun": "Engines that were not run" if document["unrun"] else "",
        "origin": "Where this comes from",
    }
    return environment.get_template(TEMPLATE).render(
        doc=document,
        fields=fields,
        probes=list(Probes.model_fields),
        version=optpass.__version__,
        headline=_headline(document, fields),
        verdict=list(filter(None, (_speed(document, fields), _quality(document, fields), _verified(document)))),
        sections=[(anchor, title) for anchor, title in shown.items() if title],
        notes=_notes(document),
        distributions=_distributions(document, fields),
        layer_charts=_layer_charts(document) if document["layers"] else (),
        op_charts=_op_charts(document, fields),
        pictures=pictures,
        commands=_commands(document),
    )


def _main(document: Mapping[str, Any], rows: str) -> int | None:
    """The number of the row of the engine that is opened by default, otherwise of the first; None without rows."""
    found = [number for number, row in enumerate(document[rows]) if row["engine"] == document["default"]]
    return found[0] if found else 0 if document[rows] else None


def _headline(document: Mapping[str, Any], fields: Fields) -> Markup:
    source, number = document["source"], _main(document, "latency")
    if number is None:
        return Markup("{}: speed was not measured").format(source)
    row, ratio = document["latency"][number], fields.html(f"latency.{number}.speedup.value", ".2f", "x")
    if row["verdict"] == "no gain":
        return Markup("{}: no gain in speed on {}").format(source, row["engine"])
    return Markup("{}: {} the speed on {}").format(source, ratio, row["engine"])


def _speed(document: Mapping[str, Any], fields: Fields) -> Markup | None:
    number = _main(document, "latency")
    if number is None:
        return None
    at = f"latency.{number}"
    verdict = document["latency"][number]["verdict"]
    said = {
        "faster": "The engine is faster",
        "slower": "The engine is slower",
        "no gain": "No difference in speed was shown",
    }[verdict]
    return Markup(
        "{}: a call (batch {}) takes {} in the median, where the unmodified model takes {} on the same engine. "
        "The speed-up lies between {} and {} with 95 % confidence{}."
    ).format(
        said,
        fields.html(f"{at}.batch"),
        fields.html(f"{at}.optimized.median_ms", ".2f", " ms"),
        fields.html(f"{at}.dense.median_ms", ".2f", " ms"),
        fields.html(f"{at}.speedup.low", ".2f", "x"),
        fields.html(f"{at}.speedup.high", ".2f", "x"),
        ", which does not exclude 1" if verdict == "no gain" else "",
    )


def _quality(document: Mapping[str, Any], fields: Fields) -> Markup | None:
    number = _main(document, "metric")
    if number is None:
        return None
    at, row = f"metric.{number}", document["metric"][number]
    drop = row["drop"]
    if drop["low"] > 0:
        judged = "a loss that chance does not explain"
    elif drop["high"] < 0:
        judged = "a gain that chance does not explain"
    else:
        judged = "which may be chance: the interval holds 0"
    return Markup("Quality, {}, went from {} to {} over {} samples: a drop of {} [{}, {}], {}.").format(
        row["name"],
        fields.html(f"{at}.dense.value", ".4f"),
        fields.html(f"{at}.optimized.value", ".4f"),
        fields.html(f"{at}.samples"),
        fields.html(f"{at}.drop.value", ".4f"),
        fields.html(f"{at}.drop.low", ".4f"),
        fields.html(f"{at}.drop.high", ".4f"),
        judged,
    )


def _verified(document: Mapping[str, Any]) -> str:
    passes, outputs = document["passes"], document["fidelity"]
    left_out = [record["name"] for record in passes if record["status"] != "kept"]
    wrong = [row["engine"] for row in outputs if not row["ok"]]
    kept = len(passes) - len(left_out)
    said = []
    if kept:
        said.append(f"Every probe of the {_counted(kept, 'pass', 'passes')} in the engine found nothing but rounding.")
    if left_out:
        said.append(f"Left out, see below: {', '.join(left_out)}.")
    if wrong:
        said.append(f"Not faithful to eager execution: {', '.join(dict.fromkeys(wrong))}.")
    elif outputs:
        engines = _counted(len({row["engine"] for row in outputs}), "engine", "engines")
        said.append(f"Every output of {engines} matches eager execution within rounding.")
    if document["unrun"]:
        said.append(f"Built and not run: {', '.join(row['engine'] for row in document['unrun'])}.")
    return " ".join(said) or "Nothing was verified."


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _notes(document: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{r['name']} was {r['status'].replace('_', ' ')}: {r['reason']}" for r in document["passes"] if r["reason"]
    ]
    return notes + [f"{r['name']} puts tokens back: {text}" for r in document["passes"] for text in r["restored"]]


def _distributions(document: Mapping[str, Any], fields: Fields) -> list[dict[str, Any]]:
    charts = []
    for number, row in enumerate(document["latency"]):
        at = f"latency.{number}"
        both = [row[which]["quantiles_ms"] for which in ("dense", "optimized")]
        if not all(len(quantiles) == 21 for quantiles in both):
            continue
        labels = [
            Markup("{}, median {}").format(word, fields.svg(f"{at}.{which}.median_ms", ".2f", " ms"))
            for word, which in (("before", "dense"), ("after", "optimized"))
        ]
        title = f"Latency of {row['engine']} before and after the passes, as dots along an axis of milliseconds"
        svg = figures.distribution(title, [(labels[0], both[0], False), (labels[1], both[1], True)])
        charts.append({"engine": row["engine"], "at": at, "svg": svg})
    return charts


def _layer_charts(document: Mapping[str, Any]) -> tuple[Markup, Markup]:
    layers = document["layers"]
    labels = [next((part for part in reversed(layer["path"].split(".")) if part[:1].isdigit()), "") for layer in layers]

    def chart(what: str, before: str, after: str, unit: float) -> Markup:
        title = f"{what} each layer, before and after the passes"
        return figures.steps(title, [x[before] / unit for x in layers], [x[after] / unit for x in layers], labels)

    tokens = chart("Tokens that enter", "dense_tokens", "tokens", 1)
    return tokens, chart("Billions of operations of", "dense_flops", "flops", 1e9)


def _op_charts(document: Mapping[str, Any], fields: Fields) -> list[dict[str, Any]]:
    charts = []
    for number, entry in enumerate(document["profile"]["engines"]):
        rows = []
        for place, op in enumerate(entry["ops"][:OPS]):
            names = ("dense_ms", "optimized_ms")
            at = f"profile.engines.{number}.ops.{place}"
            rows.append((op["op"], [(op[name] or 0.0, fields.svg(f"{at}.{name}", ".2f", " ms")) for name in names]))
        title = f"Milliseconds per call of the ops of {entry['engine']}, before and after the passes"
        charts.append({"svg": figures.pairs(title, rows), "shown": len(rows)})
    return charts


def _pictures(maps: TokenMaps, inputs: Sequence[Array]) -> dict[str, Any]:
    samples = len(maps.sites[0].place)
    image = patches.image(inputs, samples) if maps.grid else None
    count = len(maps.sites)
    chosen = sorted({round(step * (count - 1) / max(SITES - 1, 1)) for step in range(SITES)})
    totals = {name: 0 for name in ("merged", "spread", "dropped")}
    drawn = []
    for sample in range(samples):
        cells = []
        for number in chosen:
            site = maps.sites[number]
            found = patches.tokens(site, sample)
            counts = found.counts()
            totals = {name: totals[name] + counts[name] for name in totals}
            words = [("alone", "as they are"), ("merged", "merged"), ("spread", "spread"), ("dropped", "dropped")]
            told = [(name, word) for name, word in words if counts[name] or name == "alone"]
            label = f"sample {sample + 1}, {site.name} in {site.path}: " + ", ".join(
                f"{counts[name]} {word}" for name, word in told
            )
            svg = patches.picture(maps, sample, found, label, image is not None)
            cells.append(
                {
                    "svg": svg,
                    "name": site.name,
                    "path": site.path,
                    "at": f"kept.{number}.samples.{sample}",
                    "counts": told,
                }
            )
        original = patches.original(maps, sample, image[sample]) if image is not None else None
        drawn.append({"number": sample, "original": original, "cells": cells})
    return {"intro": _introduction(maps, len(chosen)), "image": image is not None, "has": totals, "samples": drawn}


def _introduction(maps: TokenMaps, drawn: int) -> str:
    what = "patch of the image" if maps.grid else "token of the sequence, row by row"
    text = [
        f"Each square is a {what}, in the example that the model was captured with.",
        "A picture shows what became of all of them up to its site.",
    ]
    if maps.prefix + maps.suffix:
        where = "are not drawn" if maps.grid else "are drawn too"
        ends = f"{maps.prefix} in front and {maps.suffix} behind"
        text.append(f"Tokens that no pass may move, such as a class token, {where}: {ends}.")
    if drawn < len(maps.sites):
        text.append(f"Of {len(maps.sites)} sites {drawn} are drawn.")
    return " ".join(text)


def _commands(document: Mapping[str, Any]) -> str:
    engines = map(Engine.model_validate, document["engines"].values())
    main = [engine for engine in engines if not engine.dense]
    backends = [f"{engine.backend}:{engine.precision}" for engine in main]
    asked = [part for name in backends for part in ("--backend", name)]
    dynamic = [part for text in main[0].declared for part in ("--dynamic", text)] if main else []
    recipe = ["--recipe", "recipe.toml"] if document["recipe"] else []
    lines = [
        ["optpass", "optimize", document["source"], *recipe, *dynamic, *asked, "--out", "artifact"],
        ["optpass", "verify", "artifact"],
        ["optpass", "bench", "artifact"],
    ]
    return "\n".join(map(shlex.join, lines))
