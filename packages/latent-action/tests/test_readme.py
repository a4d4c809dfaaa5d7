"""The README's lines of use run as they stand, on latents that no tokenizer of this project made."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_lines_of_use_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    assert names["l"].shape == (2, 4, 4)
    torch.testing.assert_close(names["K"] @ names["latents"][:, 0] + names["d"], names["z_hat"], atol=1e-5, rtol=1e-5)
    assert names["lat"].digest()
    assert (tmp_path / "lat" / "model.safetensors").is_file()
