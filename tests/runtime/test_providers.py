"""Execution providers of ONNX Runtime: what was asked for is what runs, or a refusal with the figures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

import optpass
from optpass.errors import OptpassError
from optpass.runtime import check, providers
from optpass.runtime.providers import Provider

TOKENS = np.random.default_rng(0).standard_normal((2, 9, 32)).astype(np.float32)


def test_what_a_provider_took_is_told_and_outputs_are_the_same(whole: Path) -> None:
    session = optpass.load(whole, provider="cpu", threads=1)
    assert session.name == "onnxruntime-f32"
    count = session.why.split("CPUExecutionProvider took ")[1].split(" of ")
    assert count[1] == f"{count[0]} nodes"
    assert int(count[0]) > 10
    expected = optpass.load(whole, threads=1).run(tokens=TOKENS)["logits"]
    kept = session.run(tokens=TOKENS)["logits"]
    np.testing.assert_array_equal(kept, expected)
    session.run(tokens=np.asfortranarray(TOKENS + 1))
    np.testing.assert_array_equal(kept, expected)


def test_verification_runs_the_engines_of_onnx_runtime_on_it(whole: Path) -> None:
    result = check.verify(whole, provider=Provider("cpu"), threads=1)
    assert result.ok
    assert set(result.providers) == {"onnxruntime-f32", "dense/onnxruntime-f32"}
    assert {row.engine for row in result.fidelity} == set(result.providers)


@pytest.mark.skipif("AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="another build")
def test_a_provider_that_leaves_nodes_to_the_cpu_is_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself runs all of it on the CPU, and says nothing."""
    monkeypatch.setitem(providers.PROVIDERS, "azure", "AzureExecutionProvider")
    with pytest.raises(OptpassError, match=r"AzureExecutionProvider took 0 of \d+ nodes, and 100% are asked for; see"):
        optpass.load(whole, provider="azure")
    session = optpass.load(whole, provider=Provider("azure", at_least=0.0))
    assert "CPUExecutionProvider took" in session.why


def test_a_share_below_what_is_asked_is_refused_with_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counter({"CUDAExecutionProvider": 203, "CPUExecutionProvider": 8})
    parts = [SimpleNamespace(ep_name=name, get_nodes=lambda n=n: [None] * n) for name, n in counts.items()]
    taken = providers._taken(SimpleNamespace(get_provider_graph_assignment_info=lambda: parts))
    assert str(taken) == "CUDAExecutionProvider took 203 of 211 nodes, CPUExecutionProvider took 8 of 211 nodes"
    with pytest.raises(OptpassError, match=r"took 203 of 211 nodes, and 100% are asked for; ask for at_least=0.96 "):
        providers._hold(Provider("cuda"), "CUDAExecutionProvider", taken)
    providers._hold(Provider("cuda", at_least=0.96), "CUDAExecutionProvider", taken)


@pytest.mark.parametrize(
    ("provider", "sentence"),
    [
        ("coreml", r"here has no CoreMLExecutionProvider, only .*CPUExecutionProvider; install a build"),
        ("tensorrt-rtx", r"here has no NvTensorRTRTX.*; pip install onnxruntime-ep-nv-tensorrt-rtx"),
        ("vulkan", r"there is no provider 'vulkan'; name one of cpu, cuda"),
    ],
)
def test_a_provider_that_is_not_there_is_named(provider: str, sentence: str, whole: Path) -> None:
    if providers.PROVIDERS.get(provider) in onnxruntime.get_available_providers():
        pytest.skip("it is there")
    with pytest.raises(OptpassError, match=sentence) as caught:
        optpass.load(whole, provider=provider)
    assert "\n" not in str(caught.value)


def test_a_provider_for_another_backend_is_refused(whole: Path) -> None:
    with pytest.raises(OptpassError, match=r"engine openvino-f32 is not of onnxruntime"):
        optpass.load(whole, engine="openvino-f32", provider="cpu")
    with pytest.raises(OptpassError, match=r"share of 1.5 is asked for; give 0 to 1"):
        Provider("cpu", at_least=1.5)
