"""Scripts of the GPU queue run on a CPU at a tiny size, so that their first run on a GPU is no debugging session."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_tokenizer_throughput_has_a_row_for_every_setting(tmp_path, monkeypatch):
    script, out = str(BENCHMARKS / "gpu_repvitok_throughput.py"), tmp_path / "table.md"
    settings = ["--device", "cpu", "--tiny", "--steps", "1", "--batch-sizes", "1", "2", "--compile", "0"]
    monkeypatch.setattr(sys, "argv", [script, *settings, "--out", str(out)])
    runpy.run_path(script, run_name="__main__")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.read_text().splitlines()[4:]]
    told = {tuple(row[:5]): row[5:] for row in rows}
    for batch in ("1", "2"):
        for settings in (("train", "frames", "no"), ("train", "frames", "yes"), ("encode", "flex", "no")):
            clips_per_s, milliseconds, *_ = told[settings[0], batch, settings[1], "no", settings[2]]
            assert abs(float(clips_per_s) * float(milliseconds) / 1e3 / int(batch) - 1) < 0.2
        assert told["train", batch, "flex", "no", "no"] == ["not on this device", "", "", ""]
    assert len(rows) == 2 * 2 * 3
