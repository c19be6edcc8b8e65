"""The command line around the API: options, exit codes, and what is printed where."""

from __future__ import annotations

import errno
import io
import json
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import optpass
import optpass.cli
from optpass.cli import _progress, _signals
from optpass.cli.main import main, run
from optpass.errors import OptpassError, Place
from optpass.results import (
    BenchResult,
    Fidelity,
    Interval,
    Latency,
    Metric,
    OptimizeResult,
    PassRecord,
    Probes,
    Timing,
    VerifyResult,
)
from optpass.zoo.fashion_vit import entry


def around(value: float, width: float = 0.02) -> Interval:
    return Interval(value=value, low=value - width, high=value + width)


FIDELITY = Fidelity(engine="onnxruntime", output="logits", difference=2e-6, tolerance=1e-4, shapes=[{"n": 1}], ok=True)
METRIC = Metric(
    engine="onnxruntime-f32",
    name="top1",
    samples=2000,
    dense=around(0.881),
    optimized=around(0.88),
    drop=around(0.001),
    label="measured on labelled data, on the engines",
)
LATENCY = Latency(
    engine="openvino",
    batch="8",
    dense=Timing(median_ms=10, p95_ms=12, runs=100),
    optimized=Timing(median_ms=9.9, p95_ms=12, runs=100),
    speedup=around(1.01),
    verdict="no gain",
)
KEPT = PassRecord(
    name="prune",
    options={"keep": 0.5, "at": [1, 3], "r": None},
    sites=[f"blocks.{i}" for i in range(5)],
    tokens=[197, 99, 50, 26, 14, 8],
    status="kept",
    probes=Probes(identity=0.0, permutation=2e-7),
    restored=["blocks.5, since the output has a row for each token"],
)
REFUSED = PassRecord(name="merge", options={}, status="refused", reason="[token-order] it breaks the order; use prune")
OPTIMIZED = OptimizeResult(
    ok=True,
    artifact="engine",
    source="fashion-vit",
    passes=[KEPT, REFUSED],
    fidelity=[FIDELITY],
    metric=[METRIC],
    latency=[LATENCY],
)
PRUNE = SimpleNamespace(
    name="prune",
    summary="Drop tokens.",
    paper="arXiv 1234.56789",
    options=[
        SimpleNamespace(name="keep", type="float", default=0.7, description="fraction [0, 1] that stays"),
        SimpleNamespace(name="at", type="int | None", default=None, description="block"),
    ],
)


@dataclass
class Api:
    """What stands in for the API: notes how it was called, then does what the test wants."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    act: Callable[[], Any] = lambda: None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = ModuleType("optpass.api")
        results = {
            "optimize": OPTIMIZED,
            "inspect": SimpleNamespace(text="stage main [B, 3]", data={"blocks": 6}),
            "verify": VerifyResult(ok=True, artifact="engine", files=3, fidelity=[FIDELITY]),
            "bench": BenchResult(artifact="engine", latency=[LATENCY]),
            "describe_passes": [PRUNE],
        }
        for name, result in results.items():
            setattr(module, name, self._function(name, result))
        monkeypatch.setitem(sys.modules, "optpass.api", module)
        monkeypatch.setattr(optpass, "api", module, raising=False)

    def _function(self, name: str, result: Any) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            self.calls.append({"name": name, "args": args, **kwargs})
            changed = self.act()
            return result if changed is None else changed

        return function


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    stand_in = Api()
    stand_in.install(monkeypatch)
    return stand_in


def call(*args: str) -> tuple[int, str]:
    stdout = io.StringIO()
    return run(args, stdout), stdout.getvalue()


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


COMMANDS = {
    "optimize": ("optimize", "fashion-vit", "-o", "engine"),
    "inspect": ("inspect", "fashion-vit"),
    "verify": ("verify", "engine"),
    "bench": ("bench", "engine"),
    "passes": ("passes",),
    "passes NAME": ("passes", "prune"),
    "zoo list": ("zoo", "list"),
}


# the app


def test_every_file_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help")[0] == 0
    text = capsys.readouterr().out
    files = {info.name for info in pkgutil.iter_modules(optpass.cli.__path__)} - {"main"}
    assert {"optimize", "inspect", "passes", "verify", "bench", "zoo"} <= files
    assert all(f"\n  {name} " in text for name in files if not name.startswith("_"))


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call()[0] == 0
    assert "Usage: optpass" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version")[0] == 0
    assert capsys.readouterr().out == f"optpass {optpass.__version__}\n"


def test_options_of_optimize_reach_the_api(api: Api, tmp_path: Any) -> None:
    import numpy as np

    np.savez(tmp_path / "in.npz", x=np.ones(3))
    text = (
        "optimize m.py:f -p prune -b onnxruntime -b openvino:bf16 --dynamic x:0=1..4 --dynamic y:0=1..4 -o e --force "
        f"--inputs {tmp_path}/in.npz --data d.npz --metric top1 --samples 9 --on-fail skip --seconds 0.5 "
        "--recipe r.toml"
    )
    assert call(*text.split())[0] == 0
    seen = api.calls[0]
    assert seen["args"] == ("m.py:f", "prune")
    assert seen["backend"] == ["onnxruntime", "openvino:bf16"]
    assert seen["dynamic"] == ["x:0=1..4", "y:0=1..4"]
    assert seen["inputs"]["x"].tolist() == [1, 1, 1]
    assert (seen["data"], seen["metric"], seen["samples"]) == ("d.npz", "top1", 9)
    assert (seen["on_fail"], seen["force"], seen["seconds"]) == ("skip", True, 0.5)
    assert (str(seen["out"]), str(seen["recipe"])) == ("e", "r.toml")


def test_defaults_leave_the_choice_to_the_api(api: Api) -> None:
    call(*COMMANDS["optimize"])
    call("optimize", "m", "-o", "e", "--static")
    plain, static = api.calls
    assert (plain["dynamic"], static["dynamic"]) == (None, [])
    assert (plain["backend"], plain["inputs"], plain["data"], plain["on_fail"]) == ("onnxruntime", None, None, "stop")


def test_demo_runs_both_batches_and_the_control_arm(api: Api) -> None:
    code, text = call("demo", "--samples", "16", "--seconds", "0.5")
    assert code == 0
    arms = [(seen["args"][1], seen["inputs"]["pixel_values"].shape[0]) for seen in api.calls]
    assert arms == [(entry.SCHEDULE, 8), (entry.SCHEDULE, 1), (entry.CONTROL, 8)]
    assert all((seen["metric"], seen["samples"]) == ("top1", 16) for seen in api.calls)
    assert all(seen["backend"] == ("onnxruntime", "openvino", "openvino:bf16") for seen in api.calls)
    assert "no gain" in text
    assert json.loads(call("demo", "--json")[1])["control"] == entry.CONTROL


# what is printed


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_object_and_nothing_else(name: str, api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.act = lambda: print("a library says hello")
    code, text = call(*COMMANDS[name], "--json")
    assert code == 0
    assert text.count("\n") == 1
    assert json.loads(text)["ok"] is True
    assert capsys.readouterr().out == ""


def test_json_of_optimize_holds_what_was_done(api: Api) -> None:
    data = json.loads(call(*COMMANDS["optimize"], "--json")[1])
    assert data["artifact"] == "engine"
    probes = {"identity": 0.0, "permutation": 2e-7, "equivalence": None, "incremental": None, "reuse": None}
    assert data["passes"][0]["probes"] == probes
    assert data["passes"][1]["status"] == "refused"
    assert data["latency"][0]["verdict"] == "no gain"
    assert data["fidelity"][0]["output"] == "logits"


def test_number_that_json_lacks_is_null(api: Api) -> None:
    broken = FIDELITY.model_copy(update={"difference": float("nan"), "ok": False})
    api.act = lambda: OPTIMIZED.model_copy(update={"fidelity": [broken], "ok": False})
    code, text = call(*COMMANDS["optimize"], "--json")
    assert code == 1
    assert json.loads(text)["fidelity"][0]["difference"] is None


@pytest.mark.parametrize("name", ["optimize", "verify", "bench", "inspect", "passes", "passes NAME"])
def test_table(name: str, api: Api, golden: Callable[[str, str], None]) -> None:
    code, text = call(*COMMANDS[name])
    assert code == 0
    golden(name.replace(" ", "-"), text)


def test_inspect_is_printed_as_it_is(api: Api) -> None:
    assert call(*COMMANDS["inspect"])[1] == "stage main [B, 3]\n"


def test_failed_result_exits_with_1(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = FIDELITY.model_copy(update={"ok": False, "difference": 0.5})
    api.act = lambda: OPTIMIZED.model_copy(update={"ok": False, "passes": [], "fidelity": [wrong], "artifact": ""})
    code, text = call(*COMMANDS["optimize"])
    assert code == 1
    assert "FAILED" in text
    assert text.endswith("no artifact was written\n")
    line = "error[fidelity]: logits of onnxruntime differs from eager execution by 5.0e-01; 1.0e-04 is what rounding"
    assert capsys.readouterr().err.startswith(line)


def test_refused_pass_is_one_line_and_1(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    result = OptimizeResult(ok=False, artifact="", source="m", passes=[KEPT, REFUSED], fidelity=[])
    api.act = lambda: result
    assert call(*COMMANDS["optimize"]) == (1, "")
    line = "error[token-order]: merge was refused: it breaks the order; use prune\n"
    assert capsys.readouterr().err == line
    code, text = call(*COMMANDS["optimize"], "--json")
    assert code == 1
    data = json.loads(text)
    assert [record["status"] for record in data["passes"]] == ["kept", "refused"]
    assert (data["ok"], data["error"]["code"]) == (False, "token-order")
    assert capsys.readouterr().err == line


# errors


@pytest.mark.parametrize("exit_code", [1, 2])
def test_error_is_one_line(exit_code: int, api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place("blocks.3", "sdpa", "vit.py:47")
    api.act = raising(OptpassError("token-order", "merging breaks\n order", "use prune", place, exit_code=exit_code))
    assert call(*COMMANDS["optimize"]) == (exit_code, "")
    line = "error[token-order]: merging breaks order, in blocks.3 (sdpa) at vit.py:47; use prune\n"
    assert capsys.readouterr() == ("", line)


def test_error_as_json(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.act = raising(OptpassError("unknown-pass", "there is no pass x", "see optpass passes"))
    code, text = call(*COMMANDS["optimize"], "--json")
    said = {"code": "unknown-pass", "what": "there is no pass x", "remedy": "see optpass passes", "where": None}
    assert (code, json.loads(text)) == (2, {"ok": False, "error": {**said, "exit_code": 2}})
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (KeyboardInterrupt(), 130, "error[interrupted]: stopped by Ctrl-C"),
        (_signals.Terminated(), 143, "error[terminated]: stopped by SIGTERM"),
        (SystemExit(0), 1, "error[exit]: the code of the model called sys.exit"),
        (MemoryError(), 1, "error[memory]: not enough memory"),
        (RuntimeError("a\nb"), 1, "error[internal]: internal error, RuntimeError: a b; please report it"),
        (AssertionError(), 1, "error[internal]: internal error, AssertionError"),
    ],
)
def test_whatever_is_raised_is_one_line(
    error: BaseException, code: int, start: str, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    api.act = raising(error)
    assert call(*COMMANDS["optimize"])[0] == code
    captured = capsys.readouterr().err
    assert captured.startswith(start)
    assert captured.count("\n") == 1


def test_debug_shows_the_traceback(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPTPASS_DEBUG", "1")
    api.act = raising(RuntimeError("lost"))
    assert call(*COMMANDS["optimize"])[0] == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["optimise"], "No such command 'optimise'"),
        (["optimize", "m"], "Missing option '--out'"),
        (["optimize", "m", "-o", "e", "--fast"], "No such option: --fast"),
        (["optimize", "m", "-o", "e", "--on-fail", "cry"], "Invalid value for '--on-fail'"),
        (["optimize", "m", "-o", "e", "--samples", "0"], "Invalid value for '--samples'"),
        (["optimize", "m", "-o", "e", "--static", "--dynamic", "x:0=1..4"], "--static and --dynamic exclude"),
        (["bench", "e", "--seconds", "soon"], "Invalid value for '--seconds'"),
        (["zoo"], "Missing command"),
    ],
)
def test_usage_error_is_one_line_and_2(
    args: list[str], part: str, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*args) == (2, "")
    captured = capsys.readouterr().err
    assert captured.startswith("error[usage]: ")
    assert part in captured
    assert captured.count("\n") == 1
    code, text = call(*args, "--json")
    assert (code, json.loads(text)["error"]["code"]) == (2, "usage")
    assert not api.calls


def test_unknown_pass_names_the_nearest(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("passes", "prunes")[0] == 2
    assert capsys.readouterr().err == "error[unknown-pass]: there is no pass 'prunes'; did you mean prune?\n"


class Broken(io.StringIO):
    """A stdout that cannot be written to."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_reader_that_went_away_is_no_error(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(COMMANDS["passes"], Broken(BrokenPipeError())) == 0
    assert capsys.readouterr().err == ""


def test_full_disk_under_stdout_is_an_error(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(COMMANDS["passes"], Broken(OSError(errno.ENOSPC, "No space left on device"))) == 2
    assert capsys.readouterr().err.startswith("error[stdout]: the result cannot be written to stdout: No space left")


def test_main_ends_the_process(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["passes", "nothing"])
    assert ended.value.code == 2


# progress


def test_quick_work_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.progress() as report:
        report("capture", 1, 5)
    assert capsys.readouterr() == ("", "")


def test_long_work_shows_lines_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_progress, "SECONDS", 0.0)
    with _progress.progress() as report:
        report("capture", 1, 5)
        report("verify merge", 2, 5)
    assert capsys.readouterr() == ("", "optpass: capture 1/5\noptpass: verify merge 2/5\n")


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with _progress.progress() as report:
        report("capture [3]", 1, 5)
    assert "capture [3]" in terminal.getvalue()
