"""An exported folder is what was trained, in plain timm and in pathokd."""

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from pathokd.errors import StoreError, WeightsError
from pathokd.export import export_run, export_student, load_adaptors, load_line
from pathokd.export.card import licence_note
from pathokd.export.run import SCHEMA
from pathokd.models.build import SWIGLU_ARGS
from pathokd.models.encoder import Encoder, load_encoder
from pathokd.models.projector import make_projector
from pathokd.models.standardize import Standardizer
from pathokd.models.student import FIRST, StudentSpec, build_student

CASES: dict[str, StudentSpec] = {
    "plain": StudentSpec("vit_tiny_patch16_224", {"depth": 2}, image_px=64, mpp=0.5),
    "registers": StudentSpec("vit_tiny_patch16_224", {"depth": 2, "reg_tokens": 3}, image_px=64),
    "width": StudentSpec(
        "vit_tiny_patch16_224", {"depth": 1, "embed_dim": 96, "num_heads": 2, "patch_size": 8}, image_px=32
    ),
    "swiglu": StudentSpec(
        "vit_tiny_patch16_224",
        {"depth": 2, "reg_tokens": 4, **SWIGLU_ARGS, "dynamic_img_size": True},
        image_px=64,
    ),
    "swiglu-gelu": StudentSpec("vit_tiny_patch16_224", {"depth": 1, "mlp_layer": "SwiGLUPacked"}, image_px=32),
    "dinov2": StudentSpec("vit_small_patch14_reg4_dinov2", {"depth": 1, **SWIGLU_ARGS}, image_px=56),
}


def student(name: str = "swiglu") -> Encoder:
    encoder = build_student(CASES[name]).eval()
    with torch.no_grad():  # weights that matter: LayerScale at 1e-5 would hide the blocks
        for key, parameter in encoder.model.named_parameters():
            if "ls" in key:
                parameter.fill_(0.7)
    return encoder


@pytest.mark.parametrize("name", list(CASES))
def test_plain_timm_gives_the_same_class_token(name: str, tmp_path: Path) -> None:
    encoder = student(name)
    folder = export_student(encoder, tmp_path / "student")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    side = encoder.card.image_px
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        pixels = encoder.preprocess(images)
        torch.testing.assert_close(model(pixels), encoder(images).cls, atol=1e-5, rtol=1e-5)
        again = load_encoder(folder).eval()
        torch.testing.assert_close(again(images).patches, encoder(images).patches, atol=1e-5, rtol=1e-5)
    assert again.weights_sha256 == encoder.weights_sha256
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["mean"]) == encoder.card.mean
    assert tuple(config["input_size"]) == (3, side, side)


def test_the_default_student_loads_in_plain_timm(tmp_path: Path) -> None:
    """H0-mini's shape: SwiGLU at width 768, which no timm name has."""
    encoder = build_student(StudentSpec())
    folder = export_student(encoder, tmp_path / "vitb")
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 85_739_520
    assert config["num_features"] == 768
    assert config["pathokd"]["card"]["architecture"] == "vit_base_patch14_reg4_dinov2"


def test_layers_only_pathokd_resolves_are_documented(tmp_path: Path) -> None:
    spec = StudentSpec("vit_tiny_patch16_224", {"depth": 1, "mlp_layer": "GluMlp"}, image_px=32)
    encoder = build_student(spec).eval()
    folder = export_student(encoder, tmp_path / "s")
    assert "pretrained=True, mlp_layer=timm.layers.GluMlp).eval()" in (folder / "README.md").read_text()
    line = f'timm.create_model("local-dir:{folder}", pretrained=True, mlp_layer=timm.layers.GluMlp)'
    assert load_line(folder) == line  # what `pathokd export` prints
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, mlp_layer=timm.layers.GluMlp).eval()
    with torch.no_grad():
        x = torch.rand(1, 3, 32, 32)
        torch.testing.assert_close(model(encoder.preprocess(x)), encoder(x).cls, atol=1e-5, rtol=1e-5)


def test_card_and_config_state_the_facts(tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "teacher": "h0_mini",
        "data": "phantom slides",
        "metrics": {"cosine_cls": 0.91234},
    }
    head = make_projector("linear", 192, 32)
    folder = export_student(
        student(), tmp_path / "s", adaptors={"embedded.cls": head}, facts=facts, licence="CC-BY-NC-ND-4.0"
    )
    text = (folder / "README.md").read_text()
    for words in (
        "h0_mini",
        "phantom slides",
        "| cosine_cls | 0.9123 |",
        "forbid commercial use",
        "local-dir:",
        "embedded.cls | 192 | 32",
    ):
        assert words in text
    own = json.loads((folder / "config.json").read_text())["pathokd"]
    assert own["teacher"] == "h0_mini"
    assert own["licence"] == "CC-BY-NC-ND-4.0"
    assert own["metrics"] == {"cosine_cls": 0.91234}
    assert {"mpp", "readout", "data", "version"} <= own.keys()
    assert load_encoder(folder).card.licence == "CC-BY-NC-ND-4.0"


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ("CC-BY-NC-ND-4.0", "forbid commercial use and the sharing of derived works"),
        ("CC-BY-ND-4.0", "forbid the sharing of derived works"),
        ("Owkin non-commercial", "no commercial use"),
        ("Apache-2.0", "keep its notices"),
        ("unknown", "not known"),
        ("PolyForm-Noncommercial-1.0.0", "no commercial use"),
        ("CC BY-ND 4.0", "forbid the sharing of derived works"),
        ("proprietary", "does not know what it allows"),
        ("Apache-2.0 and CC-BY-NC-ND-4.0", "forbid commercial use and the sharing of derived works"),
    ],
)
def test_licence_in_words(licence: str, words: str) -> None:
    assert words in licence_note(licence, "t").replace("\n", " ")


def test_a_student_of_two_teachers_carries_both_licences(tmp_path: Path) -> None:
    """It carried its first teacher's: Apache-2.0, of a student also made from weights that may not be shared on."""
    encoder, first = student("plain"), f"students.{FIRST}.net.encoder.model."
    card = dataclasses.replace(encoder.card, licence="Apache-2.0")
    teachers = {
        key: {"card": {"name": key, "licence": licence}, "weights_sha256": "0"}
        for key, licence in (("a", "Apache-2.0"), ("b", "CC-BY-NC-ND-4.0"))
    }
    facts = {
        "schema": SCHEMA,
        "students": {FIRST: {"card": dataclasses.asdict(card), "spec": dataclasses.asdict(CASES["plain"])}},
        "teachers": teachers,
        "targets": [],
        "ema": False,
        "facts": {},
        "metrics": {},
    }
    state = {f"{first}{name}": value for name, value in encoder.model.state_dict().items()}
    torch.save({"pathokd": facts, "state_dict": state}, tmp_path / "last.ckpt")
    folder = export_run(tmp_path / "last.ckpt", tmp_path / "both")
    assert load_encoder(folder).card.licence == "Apache-2.0 and CC-BY-NC-ND-4.0"
    text = (folder / "README.md").read_text()
    assert "license: other" in text
    assert "forbid commercial use and the sharing of derived works" in text
    teachers["b"]["card"]["licence"] = "Apache-2.0"
    torch.save({"pathokd": facts, "state_dict": state}, tmp_path / "last.ckpt")
    assert load_encoder(export_run(tmp_path / "last.ckpt", tmp_path / "one")).card.licence == "Apache-2.0"


def test_adaptors_round_trip(tmp_path: Path) -> None:
    standardizer = Standardizer(32)
    standardizer.update(torch.randn(50, 32) * 3 + 1)
    heads = {
        "t.cls": make_projector("mlp", 192, 32, 64),
        "t.patches": make_projector("linear", 192, 32),
        "t.std": standardizer,
    }
    folder = export_student(student(), tmp_path / "s", adaptors=heads)
    again = load_adaptors(f"local-dir:{folder}")
    assert again.keys() == heads.keys()
    x = torch.rand(2, 192)
    torch.testing.assert_close(again["t.cls"](x), heads["t.cls"](x))
    torch.testing.assert_close(again["t.std"](x[:, :32]), standardizer(x[:, :32]))
    assert load_adaptors(export_student(student(), tmp_path / "none")) == {}


def test_adaptor_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Projector or a Standardizer, got Linear"):
        export_student(student(), tmp_path / "s", adaptors={"x": torch.nn.Linear(1, 1)})
    assert not list(tmp_path.iterdir())
    with pytest.raises(WeightsError, match="no folder"):
        load_adaptors(tmp_path / "nothing")
    folder = export_student(student(), tmp_path / "s", adaptors={"x": make_projector("linear", 2, 2)})
    (folder / "adaptors.json").write_text('{"x": {"type": "linear"}}')
    with pytest.raises(WeightsError, match="damaged"):
        load_adaptors(folder)


def test_an_existing_folder_is_replaced_only_if_asked(tmp_path: Path) -> None:
    folder = export_student(student("plain"), tmp_path / "s")
    with pytest.raises(StoreError, match="--overwrite"):
        export_student(student(), folder)
    export_student(student(), folder, overwrite=True)
    assert load_encoder(folder).card.num_prefix_tokens == 5
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(StoreError, match="not an exported student"):
        export_student(student(), tmp_path / "other", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "s"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files gives the same error from the same call as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(StoreError, match=r"Cannot write .*File too large"):
            export_student(student(), tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_export_leaves_the_student_as_it_was(tmp_path: Path) -> None:
    encoder = student().train()
    before = encoder.weights_sha256
    export_student(encoder, tmp_path / "s")
    assert encoder.training
    assert encoder.weights_sha256 == before


def test_a_control_is_not_called_distilled(tmp_path: Path) -> None:
    folder = export_student(student("plain"), tmp_path / "control", facts={"untrained": True, "teacher": None})
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "with random weights" in text
    assert "distilled with" not in text
    assert "\n\n| | |\n" in text  # still a table


def test_a_licence_named_at_export_is_not_called_inherited(tmp_path: Path) -> None:
    folder = export_student(student("plain"), tmp_path / "named", facts={"teacher": "h0_mini"}, licence="MIT")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "inherited" not in text
    assert "MIT, as named at export (whether the terms of its teacher h0_mini allow it was not checked): keep" in text


def test_an_export_stopped_between_its_renames_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_student(student("plain"), tmp_path / "student")
    before = (folder / "model.safetensors").read_bytes()
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self.suffix == ".part" and Path(target) == folder:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        export_student(student("plain"), folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_file_of_another_kind_and_which_of_one_checkpoint_are_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="was not written by `pathokd fit`"):
        export_run(tmp_path / "x.ckpt", tmp_path / "out")
    with pytest.raises(ValueError, match="is one checkpoint"):
        export_run(tmp_path / "x.ckpt", tmp_path / "out", which="best")
