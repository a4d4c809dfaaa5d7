"""The command line: quick help, and one clear line with exit code 2 for what a user can get wrong."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from latent_action.cli import main
from latent_action.model import LatentActionTokenizer
from repvitok.data.shards import LatentShards


def test_help_and_version_answer_without_torch():
    code = (
        "import sys; from latent_action.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for flag, told in (("--help", "visualize"), ("--version", "latent-action 0.")):
        start_s = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=True)
        assert told in done.stdout
        assert time.monotonic() - start_s < 10  # under 2 s on an idle machine


@pytest.fixture
def lat_folder(fitted_lat, tmp_path):
    fitted_lat.save_pretrained(tmp_path / "lat")
    return tmp_path / "lat"


def test_label_and_probe(lat_folder, blobs, tmp_path, capsys):
    out = tmp_path / "labelled"
    assert main(["label", "--lat", str(lat_folder), "--latents", str(blobs), "--out", str(out), "--shard", "0/2"]) == 0
    assert main(["label", "--lat", str(lat_folder), "--latents", str(blobs), "--out", str(out)]) == 0
    assert LatentShards(out).meta.lat_digest == LatentActionTokenizer.from_pretrained(lat_folder).digest()
    report = tmp_path / "probe.json"
    quick = ["--head-steps", "10", "--frames-steps", "3", "--out", str(report)]
    assert main(["probe", "--lat", str(lat_folder), "--latents", str(out), *quick]) == 0
    assert "mean action" in capsys.readouterr().out
    assert np.isfinite(json.loads(report.read_text())["latent_action"]["mean_r2"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["label", "--lat", "{lat}", "--latents", "{tmp}/none", "--out", "{tmp}/o"], "no such folder"),
        (["label", "--lat", "{tmp}/none", "--latents", "{blobs}", "--out", "{tmp}/o"], "does not exist"),
        (
            ["label", "--lat", "{lat}", "--latents", "{blobs}", "--out", "{tmp}/o", "--shard", "2/2"],
            "expected I/N with 0 <= I < N",
        ),
        (["label", "--lat", "{lat}", "--out", "{tmp}/o"], "--latents"),
        (["probe", "--lat", "{lat}", "--latents", "{tmp}"], "meta.json"),
        (["label", "--lat", "{lat}", "--latents", "{blobs}", "--out", "{lat}"], "holds no unfinished latents but a"),
        (["export", "--ckpt", "{tmp}/none.ckpt", "--out", "{tmp}/o"], "no checkpoint"),
        (["fit", "--data.latents={tmp}/none", "--model.lat.latent_dim=8", "--trainer.max_steps=1"], "no such folder"),
        (["fit", "--data.latents={blobs}", "--model.lat.latent_dim=9", "--trainer.max_steps=1"], "8 channels"),
        (["fit", "--data.latents={blobs}", "--model.lat.latent_dim=8"], "max_steps"),
        (["fit", "--data.latents={blobs}", "--model.lat.pooling=max"], "pooling"),
        (["nonsense"], "nonsense"),
    ],
)
def test_mistakes_end_in_one_line(arguments, told, lat_folder, blobs, tmp_path, capsys):
    filled = [a.format(lat=lat_folder, blobs=blobs, tmp=tmp_path) for a in arguments]
    if filled[0] == "fit":
        filled += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert main(filled) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error
