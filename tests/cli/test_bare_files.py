"""Verbs that run a teacher take a bare file of weights, or its first blocks."""

from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from pathokd.cli.main import main
from pathokd.data.targets import TargetStore

ARGS = {"embed_dim": 16, "num_heads": 2, "patch_size": 8, "img_size": 32}


@pytest.mark.parametrize("verb", ["cache", "denoise", "prototypes"])
def test_a_bare_file_and_its_first_blocks(
    verb: str, registered_packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0, **ARGS)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    options = {"cache": [], "denoise": ["--rank", "2"], "prototypes": ["--k", "8"]}[verb]
    words = [verb, str(tmp_path / "bare.safetensors"), str(registered_packed), *options, "--out", str(tmp_path / "out")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "architecture" in error
    assert len(error.strip().splitlines()) == 1
    known = ["--architecture", "vit_tiny_patch16_224", "--model-args", str({**ARGS, "depth": 2})]
    assert main([*words, *known]) == 0
    if verb == "cache":
        assert TargetStore(tmp_path / "out").header["facts"]["card"]["model_args"]["depth"] == 2
