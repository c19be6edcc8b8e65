"""Every kind of source, and what is said of one that is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.export import Dim

from optpass.capture import capture
from optpass.errors import OptpassError
from tests.architectures import FACTORIES
from tests.capture import models

HERE = "tests.capture.models"


def save(name: str, directory: Path) -> Path:
    module, _, _ = FACTORIES[name]()
    module.save_pretrained(directory)  # type: ignore[operator]
    return directory


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("vit", tmp_path_factory.mktemp("saved") / "vit")


@pytest.fixture
def copy(vit: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vit, tmp_path / "vit"))


def refusal(source: object, **options: object) -> str:
    with pytest.raises(OptpassError) as caught:
        capture(source, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return str(caught.value)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# what is captured


def test_zoo_name() -> None:
    stage = capture("fashion-vit").main
    assert stage.inputs[0].shape == (8, 1, 28, 28)
    assert stage.outputs[0].shape == (8, 10)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("vit", {"pixel_values"}),
        ("llama", {"input_ids"}),
        ("bert", {"input_ids", "attention_mask"}),
        ("bart_encoder", {"input_ids", "attention_mask"}),
        ("smolvlm_vision", {"pixel_values"}),
        ("llava", {"input_ids", "pixel_values"}),
        ("clip_dual", {"input_ids", "attention_mask", "pixel_values"}),
        ("dit", {"hidden_states", "timestep", "class_labels"}),
        ("cogvideox", {"hidden_states", "timestep", "encoder_hidden_states"}),
    ],
)
def test_directory_of_a_saved_model(
    name: str, inputs: set[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = save(name, tmp_path / name)
    capfd.readouterr()
    program = capture(str(directory))
    assert {spec.name for spec in program.main.inputs} == inputs
    assert program.source == str(directory)
    assert capfd.readouterr() == ("", "")


def test_weights_come_from_the_files(vit: Path) -> None:
    module, _, kwargs = FACTORIES["vit"]()
    stage = capture(str(vit), inputs=kwargs).main
    with torch.no_grad():
        assert torch.equal(stage.run(stage.example)[0], module(**kwargs).logits)


def test_weights_in_many_files(tmp_path: Path) -> None:
    module, _, _ = FACTORIES["vit"]()
    module.save_pretrained(tmp_path, max_shard_size="50KB")  # type: ignore[operator]
    assert capture(str(tmp_path)).main.outputs[0].name == "logits"
    sorted(tmp_path.glob("*-of-*.safetensors"))[1].unlink()
    assert "[missing-weights] there is no " in refusal(str(tmp_path))


def test_pipeline_directory(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    save("dit", tmp_path / "transformer")
    assert capture(str(tmp_path)).main.outputs[0].shape == (2, 4, 14, 14)


def test_inputs_take_the_place_of_examples(vit: Path) -> None:
    stage = capture(str(vit), inputs={"pixel_values": np.zeros((3, 1, 28, 28), np.float32)}).main
    assert stage.inputs[0].shape == (3, 1, 28, 28)


def test_exported_file_with_the_dimensions_it_declares(tmp_path: Path) -> None:
    module, _, kwargs = FACTORIES["vit"]()
    shapes = {"pixel_values": {0: Dim("size", min=1, max=16)}}
    torch.export.save(torch.export.export(module, (), kwargs, dynamic_shapes=shapes), tmp_path / "vit.pt2")
    stage = capture(str(tmp_path / "vit.pt2")).main
    assert stage.outputs[0].shape == ("pixel_values_0", 2)
    assert stage.ranges["pixel_values_0"].maximum == 16
    assert capture(str(tmp_path / "vit.pt2"), dynamic=[]).main.outputs[0].shape == (2, 2)


def test_factory_with_a_call() -> None:
    assert capture(f"{HERE}:plain").main.inputs[0].name == "x"


def test_factory_of_a_module_with_examples_and_dimensions() -> None:
    stage = capture(f"{HERE}:with_examples").main
    assert stage.inputs[0].shape == ("batch", 5, 8)
    assert capture(f"{HERE}:with_examples", dynamic=[]).main.inputs[0].shape == (2, 5, 8)


def test_factory_beside_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import torch\ndef make():\n    return torch.nn.Linear(4, 4), torch.ones(2, 4)\n"
    (tmp_path / "lying_here.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert capture("lying_here:make").main.outputs[0].shape == (2, 4)


def test_call_as_tuple_or_keywords() -> None:
    by_name = capture((models.Plain(), {"x": models.example()})).main
    by_place = capture((models.Plain(), (models.example(),))).main
    assert by_name.inputs == by_place.inputs


def test_training_mode_is_left(vit: Path) -> None:
    module = models.DropsInTraining().train()
    stage = capture((module, (models.example(),))).main
    assert torch.equal(stage.run(stage.example)[0], module.linear(models.example()))


# what is refused


def test_id_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert refusal("nobody/such-model").startswith(
        "[model-id] nobody/such-model is not in the local cache and cannot be downloaded"
    )


def test_name_that_is_nearly_right() -> None:
    assert refusal("fashion-vitt").endswith("did you mean fashion-vit?")


def test_path_that_is_not_there() -> None:
    assert refusal("./gone.pt2") == "[missing-file] there is no file or directory ./gone.pt2; check the path"


def test_directory_without_a_model(tmp_path: Path) -> None:
    assert "has neither config.json nor model_index.json" in refusal(str(tmp_path))


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "model.py", "notes.txt"])
def test_file_of_another_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    assert "[not-a-model]" in refusal(str(tmp_path / name))


def test_truncated_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "is no readable safetensors file" in refusal(str(copy))


def test_missing_weights_file(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "[missing-weights]" in refusal(str(copy))


def test_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "is not readable JSON; mend the file" in refusal(str(copy))


def test_config_without_a_class(copy: Path) -> None:
    edit_config(copy, architectures=None)
    assert "names no architecture" in refusal(str(copy))


def test_config_with_an_unknown_class(copy: Path) -> None:
    edit_config(copy, architectures=["OurNet"])
    assert "has no model class OurNet; write a module:factory" in refusal(str(copy))


def test_config_of_a_deeper_model(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=5)
    assert "lack weight vit.layers.4." in refusal(str(copy))


def test_config_of_a_narrower_model(copy: Path) -> None:
    edit_config(copy, hidden_size=32)
    assert "has another shape than config.json asks for" in refusal(str(copy))


def test_weights_that_are_not_finite(copy: Path) -> None:
    file = copy / "model.safetensors"
    weights = load_file(file)
    weights["classifier.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    assert refusal(str(copy)).startswith("[weights-not-finite] weight classifier.weight holds NaN")


@pytest.mark.parametrize("damage", ["cut", "flip", "none of it"])
def test_damaged_exported_file(damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plain.pt2"
    torch.export.save(torch.export.export(models.Plain(), (models.example(),)), path)
    whole = path.read_bytes()
    weights = models.Plain().linear.weight.detach().numpy().tobytes()
    at = whole.index(weights) + 7
    flipped = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
    path.write_bytes({"cut": whole[:-400], "flip": flipped, "none of it": b"hello"}[damage])
    assert "is no readable torch.export file" in refusal(str(path))
    assert capfd.readouterr() == ("", "")


def test_module_without_examples() -> None:
    assert "without example inputs; return (module, args, kwargs)" in refusal(f"{HERE}:without_examples")


def test_factory_of_something_else() -> None:
    assert refusal(f"{HERE}:number").startswith(f"[not-a-model] {HERE}:number gives a int, not a model")


def test_factory_that_raises() -> None:
    text = refusal(f"{HERE}:raises")
    assert "raised ValueError: no weights here" in text
    assert "models.py:" in text


def test_factory_that_is_not_there() -> None:
    assert refusal(f"{HERE}:plane").endswith("did you mean tests.capture.models:plain?")
    assert "no module named not_there" in refusal("not_there:factory")


def test_inputs_that_do_not_fit() -> None:
    source = (models.Plain(), (models.example(),))
    assert refusal(source, inputs={"y": models.example()}) == "[input-names] the model has no input y; inputs are x"
    assert "[input-dtype] input x is no tensor" in refusal(source, inputs={"x": np.array(["a"])})
    assert "[model-fails]" in refusal(source, inputs={"x": np.zeros((2, 5, 7), np.float32)})


def test_something_that_is_no_source() -> None:
    assert "[not-a-model]" in refusal((nn.Linear(2, 2), (), {}, "more"))
    assert "[unknown-model]" in refusal(3)
