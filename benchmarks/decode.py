"""Tokens per second of greedy decoding: Hugging Face, OpenVINO GenAI and optpass, plain and with speculation.

One run, on three kinds of prompts of held-out text (completion of code, an edit that copies most of it, open text). For
each prompt all arms make the same number of tokens one after the other, in an order drawn by lot; what is compared are
the times of one prompt. Hugging Face runs in this process, GenAI in one of its own, on a model that optimum exported,
with the weights that optpass has.

``--wide 16`` gives the model, and all arms alike, inner layers of 16 times the width that compute the same: 40 million
weights, which come from memory for each token, as those of the models do that speculation is made for. The weights of
``stdlib-lm`` itself stay in the cache of the processor, where a step of 8 tokens costs twice one of a single token.

    python -m venv peers && peers/bin/pip install -r benchmarks/decode_peers.txt
    python -m benchmarks.decode --peers peers/bin/python
    python -m benchmarks.decode --peers peers/bin/python --wide 16 --prompts 4
    python -m benchmarks.decode --past 128 1024 4096
    python -m benchmarks.decode --lossless         # 200 prompts, every drafter and size, against Hugging Face: no times
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import optpass
from benchmarks import report
from optpass import measure
from optpass.results import Interval
from optpass.runtime.drafters.base import create
from optpass.runtime.generate import ALONE, Generator
from optpass.runtime.kept import Kept
from optpass.zoo.stdlib_lm import entry

KINDS = ("completion", "edit", "open")
NODES = (2, 4, 8, 16, 32, 60)
"""Sizes at which no token may change."""

LOOKUP = 10
"""Tokens that the lookups of the peers draft; both name it as their default."""

Ids = np.ndarray[Any, np.dtype[np.int64]]
Arm = Callable[[Ids, int], tuple[Ids, float]]
"""Continues a prompt by so many tokens: these, and the seconds they took."""


def model(wide: int) -> Any:
    """``stdlib-lm``, with inner layers that many times as wide: each unit comes as often, with as much less weight."""
    import transformers

    module: Any = entry.factory()[0]
    config = module.config.to_dict()
    state = dict(module.state_dict())
    for name, weight in state.items():
        if "gate_proj" in name or "up_proj" in name:
            state[name] = weight.repeat(wide, 1)
        elif "down_proj" in name:
            state[name] = weight.repeat(1, wide) / wide
    config |= {"intermediate_size": wide * config["intermediate_size"]}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    made.load_state_dict(state)
    return made.eval()


def hugging_face(lookup: bool, wide: int = 1) -> Arm:
    """``generate`` with the cache of the model."""
    module = model(wide)
    module.generation_config.eos_token_id = None
    more = {"prompt_lookup_num_tokens": LOOKUP} if lookup else {}

    def run(prompt: Ids, count: int) -> tuple[Ids, float]:
        ids = torch.from_numpy(prompt[None])
        begin = time.perf_counter()
        with torch.inference_mode():
            made = module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=0, **more,
            )  # fmt: skip
        return made[0, len(prompt) :].numpy(), time.perf_counter() - begin

    return run


class GenAi:
    """OpenVINO GenAI in its own environment."""

    def __init__(self, python: str, folder: Path, precision: str, threads: int, kind: str) -> None:
        script = Path(__file__).parent / "decode_genai.py"
        command = [python, str(script), "serve", str(folder), precision, str(threads), kind]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()["ready"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit("the peer has ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __call__(self, prompt: Ids, count: int) -> tuple[Ids, float]:
        assert self.process.stdin is not None
        print(
            json.dumps({"ids": prompt.tolist(), "count": count, "drafts": LOOKUP}), file=self.process.stdin, flush=True
        )
        answer = self._answer()
        return np.array(answer["tokens"], np.int64), answer["seconds"]


def ours(session: Generator, drafter: str | None, lengths: list[int] | None = None) -> Arm:
    """A generator with a drafter that is as it is made, or none."""
    kept = create(drafter, session.vocabulary) if drafter else None

    def run(prompt: Ids, count: int) -> tuple[Ids, float]:
        begin = time.perf_counter()
        made = session.generate(prompt[None], max_new_tokens=count, drafter=kept)
        seconds = time.perf_counter() - begin
        if lengths is not None:
            lengths.extend(session.last.lengths)
        return made[0, len(prompt) :], seconds

    return run


def artifacts(folder: Path, backends: Sequence[str], wide: int = 1) -> dict[str, Path]:
    """``cache`` alone, and with ``speculate``."""
    found = {}
    source: Any = (model(wide), (), entry.factory()[2])
    dynamic = ["input_ids:0=batch:1..3", entry.DYNAMIC[1]]
    for name, passes in (("plain", "cache"), ("verifying", "cache,speculate")):
        result = optpass.optimize(source, passes, backend=list(backends), dynamic=dynamic, out=folder / name, seconds=0)
        assert result.ok, result
        found[name] = folder / name
    return found


def ratio(base: Sequence[float], arm: Sequence[float]) -> Interval:
    """How many times faster than ``base``: geometric mean over prompts, with a bootstrap interval of 95 %."""
    logs = np.log(np.array(base) / np.array(arm))
    rng = np.random.default_rng(0)
    means = logs[rng.integers(len(logs), size=(2000, len(logs)))].mean(1)
    low, high = np.exp(np.percentile(means, (2.5, 97.5)))
    return Interval(value=float(np.exp(logs.mean())), low=float(low), high=float(high))


def speed(given: argparse.Namespace, about: dict[str, Any]) -> None:
    """The table of times."""
    torch.set_num_threads(given.threads)
    prompts = {kind: entry.prompts(kind, given.prompts) for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = artifacts(folder, given.backend, given.wide)
        arms: dict[str, Arm] = {
            "Hugging Face": hugging_face(False, given.wide),
            "Hugging Face, lookup": hugging_face(True, given.wide),
        }
        if given.peers:
            exported = folder / "exported"
            subprocess.run(
                [
                    given.peers,
                    str(Path(__file__).parent / "decode_genai.py"),
                    "export",
                    str(saved(folder, given.wide)),
                    str(exported),
                ],
                check=True,
            )
            for precision in given.precision:
                for kind in ("plain", "lookup"):
                    name = f"GenAI {precision}" + (", lookup" if kind == "lookup" else "")
                    arms[name] = GenAi(given.peers, exported, precision, given.threads, kind)
        lengths: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        current: dict[str, list[int]] = {}
        for engine in (f"step/{b.replace(':', '-')}" if ":" in b else f"step/{b}-f32" for b in given.backend):
            label = engine.removeprefix("step/")
            arms[f"optpass {label}"] = ours(generator(made["plain"], engine, given.threads), None)
            verifying = generator(made["verifying"], engine, given.threads)
            for drafter in given.drafters:
                name = f"optpass {label}, {drafter}"
                current[name] = []
                arms[name] = ours(verifying, drafter, current[name])
        times: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in KINDS}
        differing: dict[str, int] = defaultdict(int)
        rng = np.random.default_rng(0)
        for arm in arms.values():
            arm(prompts["completion"][0], 8)  # warm
        jobs = [
            (kind, prompt)
            for number in range(given.prompts)
            for kind in KINDS
            for prompt in prompts[kind][number : number + 1]
        ]
        for number, (kind, prompt) in enumerate(jobs):
            outputs = {}
            for name in rng.permutation(list(arms)):
                if name in current:
                    current[name].clear()
                outputs[name], seconds = arms[name](prompt, given.tokens)
                times[kind][name].append(seconds)
                if name in current:
                    lengths[kind][name] += current[name]
            for name, output in outputs.items():
                differing[name] += not np.array_equal(output, outputs["Hugging Face"])
            if number % 10 == 9:
                report.say(f"{number + 1} of {len(jobs)} prompts")
    sections = [(kind, _table(times[kind], lengths[kind], given.tokens)) for kind in KINDS]
    every = {name: [t for kind in KINDS for t in times[kind][name]] for name in arms}
    steps = {name: [n for kind in KINDS for n in lengths[kind][name]] for name in arms}
    sections.append(("all kinds", _table(every, steps, given.tokens)))
    rows = [(name, f"{count} of {len(jobs)}") for name, count in differing.items() if name != "Hugging Face"]
    sections.append(("Texts that differ from those of Hugging Face", report.table(("arm", "differ"), rows)))
    data = {
        "machine": about, "threads": given.threads, "wide": given.wide, "tokens": given.tokens,
        "prompts": given.prompts,
        "times": times, "lengths": {kind: {n: float(np.mean(x)) for n, x in lengths[kind].items()} for kind in KINDS},
        "differ": differing,
    }  # fmt: skip
    print(
        report.write(f"decode_wide_{given.wide}" if given.wide > 1 else "decode", data, sections)
        if given.write
        else "\n".join(f"{a}\n{b}\n" for a, b in sections)
    )


def generator(folder: Path, engine: str, threads: int) -> Generator:
    """An engine of an artifact."""
    session = optpass.load(folder, engine=engine, threads=threads)
    assert isinstance(session, Generator)
    return session


def saved(folder: Path, wide: int) -> Path:
    """The model as Hugging Face saves it."""
    target = folder / "hugging_face"
    model(wide).save_pretrained(target)
    entry.tokenizer().save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return target


def _table(times: Mapping[str, Sequence[float]], lengths: Mapping[str, Sequence[int]], count: int) -> str:
    plain = {name: name.split(",")[0] for name in times}
    rows = []
    for name, seconds in times.items():
        rate = count / float(np.median(seconds))
        over = report.ratio(ratio(times["Hugging Face"], seconds))
        own = report.ratio(ratio(times[plain[name]], seconds)) if plain[name] != name else ""
        accepted = f"{np.mean(lengths[name]):.2f}" if lengths.get(name) else ""
        rows.append((name, f"{rate:.0f}", over, own, accepted))
    return report.table(("arm", "tokens/s, median", "over Hugging Face", "over its own plain", "tokens per step"), rows)


def lossless(given: argparse.Namespace) -> None:
    """Every drafter and size on 200 prompts; a difference is reported with the gap between the two likeliest tokens."""
    each = -(-given.prompts // len(KINDS))
    prompts = [prompt for kind in KINDS for prompt in entry.prompts(kind, each)][: given.prompts]
    truth = hugging_face(False)
    expected = [truth(prompt, given.tokens)[0] for prompt in prompts]
    with tempfile.TemporaryDirectory() as scratch:
        made = artifacts(Path(scratch), given.backend)
        for engine in (f"step/{b}-f32" for b in given.backend if ":" not in b):
            session, verifying = (generator(made[kind], engine, given.threads) for kind in ("plain", "verifying"))
            arms: dict[str, tuple[Generator, dict[str, Any]]] = {"plain": (session, {})}
            for drafter in given.drafters:
                for nodes in NODES:
                    arms[f"{drafter}, {nodes} nodes"] = (verifying, {"drafter": drafter, "nodes": nodes})
            for name, (model, options) in arms.items():
                gaps = []
                for prompt, wanted in zip(prompts, expected, strict=True):
                    found = model.generate(prompt[None], max_new_tokens=given.tokens, **options)[0, len(prompt) :]
                    if not np.array_equal(found, wanted):
                        at = int((found != wanted).argmax())
                        text = np.concatenate([prompt, wanted[:at]])
                        logits = np.sort(session.run(input_ids=text[None])["logits"][0, -1])
                        gaps.append(float(logits[-1] - logits[-2]))
                report.say(
                    f"{engine}, {name}: {len(gaps)} of {len(prompts)} differ" + (f", gaps {gaps}" if gaps else "")
                )


LONG = 8192
"""Context of the model, with random weights, at which the cost of a long text is shown."""


def past(given: argparse.Namespace, about: dict[str, Any]) -> None:
    """Seconds of a token by the number of tokens before it, beside a copy of everything that is kept."""
    import transformers

    module, _, call = entry.factory()
    config = module.config.to_dict()  # type: ignore[operator, union-attr]
    torch.manual_seed(0)
    long = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "max_position_embeddings": LONG}))
    dynamic = ["input_ids:0=batch:1..3", f"input_ids:1=tokens:2..{LONG}"]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "long"
        result = optpass.optimize(
            (long.eval(), (), call), "cache", backend=given.backend, dynamic=dynamic, out=out, seconds=0
        )
        assert result.ok, result
        for backend in given.backend:
            engine = f"step/{backend.replace(':', '-')}" if ":" in backend else f"step/{backend}-f32"
            session = generator(out, engine, given.threads)
            states = {}
            for count in given.past:
                states[count] = session.start()
                for _ in session.feed(states[count], [np.arange(count) % session.vocabulary], last=True):
                    pass
            jobs = {count: partial(_token, session, kept) for count, kept in states.items()}
            copies = {count: partial(_copy, kept) for count, kept in states.items()}
            every = [*jobs.values(), *copies.values()]
            times = measure.interleave(every, given.seconds, fewest=20).times
            medians = [1e3 * float(np.median(t)) for t in times]
            for place, count in enumerate(given.past):
                kept_mib = sum(r.nbytes for r in states[count].rows.values()) / 2**20
                copy = f"{medians[len(jobs) + place]:.2f}"
                rows.append(
                    (engine.removeprefix("step/"), str(count), f"{medians[place]:.2f}", copy, f"{kept_mib:.1f}")
                )
    head = ("engine", "tokens before", "ms per token", "ms to copy what is kept once", "MiB kept")
    sections = [("A token behind a long text", report.table(head, rows))]
    data = {"machine": about, "threads": given.threads, "rows": rows}
    print(report.write("decode_past", data, sections) if given.write else sections[0][1])


def _token(session: Generator, kept: Kept) -> None:
    """One token, kept and forgotten again."""
    before = kept.position.copy()
    results = session.step(kept, np.array([[5]]), np.array([[0]]))
    kept.append(results, np.array([1]))
    kept.rollback(before)


def _copy(kept: Kept) -> None:
    for rows in kept.rows.values():
        rows.copy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="the Python of the environment of decode_peers.txt")
    parser.add_argument("--prompts", type=int, help="of each kind; with --lossless of all kinds")
    parser.add_argument("--tokens", type=int, default=96, help="to make from each prompt")
    parser.add_argument("--wide", type=int, default=1, help="how many times as wide the inner layers are")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--precision", nargs="+", default=["f32"], help="of GenAI")
    parser.add_argument("--drafters", nargs="+", default=list(ALONE))
    parser.add_argument("--lossless", action="store_true")
    parser.add_argument("--past", type=int, nargs="+", help="time a token behind texts of these lengths, nothing else")
    parser.add_argument("--seconds", type=float, default=20.0, help="of --past, for each engine")
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True, help="to results/")
    given = parser.parse_args()
    if given.past:
        past(given, report.machine())
    elif given.lossless:
        given.prompts = given.prompts or 200
        lossless(given)
    else:
        given.prompts = given.prompts or 20
        speed(given, report.machine())


if __name__ == "__main__":
    main()
