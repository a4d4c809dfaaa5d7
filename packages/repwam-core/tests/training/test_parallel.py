"""Sharded training equals one process: weights, steps, interruptions, other numbers of ranks."""

import multiprocessing
import runpy
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from repvitok.checkpointing import is_sharded, read_checkpoint
from repvitok.curves import read_curves
from repwam_core.export import read_trained
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.initial import initial_draws, initialise
from repwam_core.model.wam import WorldActionModel

RANK = Path(__file__).with_name("rank.py")
PACKED = (
    "--data.packing.token_budget=300", "--data.packing.open_sequences=4", "--model.wam.depth=2",
    "--model.optimizer.name=muon", "--model.optimizer.lr=0.02", "--model.optimizer.adamw_lr=0.005",
    "--model.optimizer.newton_schulz_dtype=float64", "--model.scale.init=per_parameter", "--trainer.max_steps=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks(recipe) -> Callable[..., list[int]]:
    """Run `repwam fit` on several gloo CPU ranks; return their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch.cli", "repwam_core.training.module"])

    def run(folder: Path, world: int, *overrides: str, shard_size: int | None = None, before: str = "") -> list[int]:
        strategy = {
            "class_path": "repwam_core.training.parallel.ShardedStrategy",
            "init_args": {"shard_size": shard_size},
        }
        arguments = [
            "fit", "-c", str(recipe), f"--trainer.default_root_dir={folder}", f"--trainer.devices={world}",
            f"--trainer.strategy={strategy}".replace("'", '"').replace("None", "null"), *overrides,
        ]  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(world):
            place = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port,
            }  # fmt: skip
            globals_ = {"place": place, "arguments": arguments, "before": before}
            process = context.Process(target=runpy.run_path, args=(str(RANK), globals_))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(700)  # minutes on a busy machine
        return [process.exitcode for process in processes]

    return run


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return read_trained(checkpoint).wam.state_dict()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def alone(fit, tmp_path_factory) -> dict[int, Path]:
    """Five steps in one process, of as many sequences as 2 or 4 ranks take together."""
    root = tmp_path_factory.mktemp("alone")
    return {ranks: fit(root / str(ranks), *PACKED, f"--trainer.accumulate_grad_batches={ranks}") for ranks in (2, 4)}


@pytest.mark.slow
def test_two_ranks_equal_one_process_and_resume_exactly(ranks, alone, tmp_path):
    assert ranks(tmp_path / "whole", 2, *PACKED) == [0, 0]
    whole = weights(tmp_path / "whole" / "last.ckpt")
    assert_close(whole, weights(alone[2]))
    # Stopped in the middle of the epoch after three steps, validated on the way, and gone on.
    halves = tmp_path / "halves"
    assert ranks(halves, 2, *PACKED, "--trainer.limit_train_batches=3", "--trainer.max_epochs=1") == [0, 0]
    assert read_checkpoint(halves / "last.ckpt")["global_step"] == 3
    assert ranks(halves, 2, *PACKED, "--ckpt_path=last", "--trainer.val_check_interval=4") == [0, 0]
    resumed = weights(halves / "last.ckpt")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    assert "val/action_mae" in read_curves(halves)


@pytest.mark.slow
def test_four_ranks_in_two_copies_equal_one_process_and_go_on_as_two(ranks, alone, tmp_path):
    assert ranks(tmp_path, 4, *PACKED, shard_size=2) == [0] * 4
    assert_close(weights(tmp_path / "last.ckpt"), weights(alone[4]))
    more = [item for item in PACKED if "max_steps" not in item]
    assert ranks(tmp_path, 2, *more, "--trainer.max_steps=6", "--ckpt_path=last") == [0, 0]
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert content["global_step"] == 6
    loader = content["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert loader["packer"]["packed"] == 5 * 4 + 2


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_last_whole_checkpoint(ranks, tmp_path):
    breaks = """
import os, signal
from repwam_core.training import distributed_checkpoint as target
publish = target._publish
def _publish(partial, folder, path):
    if path.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    publish(partial, folder, path)
target._publish = _publish
"""
    assert ranks(tmp_path, 1, *PACKED, "--checkpoint.every_n_steps=2", before=breaks) == [-9]
    assert is_sharded(tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2
    assert ranks(tmp_path, 1, *PACKED, "--ckpt_path=last") == [0]
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 5
    assert sorted(path.name for path in tmp_path.glob("*last.ckpt*")) == ["last.ckpt", "last.ckpt-000005"]


@pytest.mark.slow
def test_bf16_recomputation_and_two_ranks_train(ranks, tmp_path):
    options = ("--trainer.precision=bf16-mixed", "--model.scale.recompute=offload", "--trainer.max_steps=2")
    assert ranks(tmp_path, 2, *(item for item in PACKED if "max_steps" not in item), *options) == [0, 0]
    trained = weights(tmp_path / "last.ckpt")
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    assert all(weight.isfinite().all() for weight in trained.values())


def small(**changes: object) -> WorldActionModel:
    space = ActionSpace(channels=3, vectors_per_transition=2, state_channels=2)
    sizes = {"width": 32, "depth": 2, "heads": 2, "ffn": 64, "action_width": 16, "action_ffn": 32, "latent_dim": 8}
    settings = {**sizes, "text_dim": 8, "state_token": True, "spaces": {"robot": space}, **changes}
    return WorldActionModel(WAMConfig.preset("tiny", **settings))


@pytest.mark.parametrize("attention", ["shared", "per_modality"])
def test_weights_drawn_by_name_have_the_models_own_distributions(attention):
    torch.manual_seed(0)
    own, drawn = small(attention=attention), small(attention=attention)
    with torch.no_grad():
        for parameter in drawn.parameters():
            parameter.fill_(float("nan"))
    initialise(drawn, seed=0)
    for (name, ours), theirs in zip(drawn.named_parameters(), own.parameters(), strict=True):
        if theirs.unique().numel() <= 2:
            assert torch.equal(ours, theirs), name
        else:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.5, abs=1e-3), name
            assert ours.abs().max() < 2 * theirs.abs().max(), name
    assert len(list(initial_draws(drawn))) == len(list(drawn.parameters()))


def test_weights_drawn_by_name_depend_on_seed_and_name_only():
    one, other, deeper = small(), small(), small(depth=3)
    for model in (one, deeper):
        initialise(model, seed=1)
    initialise(other, seed=2)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, deeper.state_dict()[name])
    assert not torch.equal(one.video_in.weight, other.video_in.weight)


def test_a_stream_of_draws_cannot_be_sharded(fit, tmp_path, capsys):
    fit(tmp_path, *PACKED, "--model.scale.init=wrong", expect=2)
    assert "scale.init: expected one of" in capsys.readouterr().err
