"""Sharded training equals one process: weights, steps, interruptions, other numbers of ranks."""

import multiprocessing
import runpy
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from repvitok.runtime.checkpointing import find_checkpoint, read_checkpoint
from repvitok.runtime.progress import read_curves
from repwam_core.export import export_wam, read_trained
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.wam import WorldActionModel, initial_draws
from repwam_core.training.parallel import _publish, initialise, read_whole

RANK = Path(__file__).with_name("rank.py")
PACKED = (
    "--data.packing.token_budget=300", "--data.packing.open_sequences=4", "--model.wam.depth=2",
    "--model.optimizer.name=muon", "--model.optimizer.lr=0.02", "--model.optimizer.adamw_lr=0.005",
    "--model.optimizer.newton_schulz_dtype=float64", "--model.scale.init=per_parameter", "--trainer.max_steps=5",
    "--model.loss.look_ahead=2", "--model.loss.delay=1",
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


KILLED = """
import os, signal, sys
seen = 0
def hook(event, arguments):
    global seen
    if event == {event!r} and {name!r} in str(arguments[{argument}]) and os.environ["RANK"] == {rank!r}:
        if event != "open" or (arguments[2] or 0) & os.O_CREAT:
            seen += 1
            if seen == {number}:
                os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


@pytest.mark.slow
def test_kills_while_ranks_save_lose_nothing_and_more_ranks_go_on(ranks, tmp_path):
    saving = (*PACKED, "--checkpoint.every_n_steps=1")
    whole = tmp_path / "whole"
    assert ranks(whole, 2, *saving, "--checkpoint.generations=9") == [0, 0]

    def holds(step: int) -> None:
        found = find_checkpoint(tmp_path / "run")
        assert found is not None
        assert found.step == step
        undisturbed = read_whole(whole / f"last.ckpt-{step:06d}")
        for part in ("state_dict", "ema_average"):
            for name, value in read_whole(found.path)[part].items():
                assert torch.equal(value, undisturbed[part][name]), (part, name)

    # The second rank is killed as it opens its part of the third save.
    in_a_part = KILLED.format(event="open", name="__1_", argument=0, rank="1", number=3)
    codes = ranks(tmp_path / "run", 2, *saving, before=in_a_part)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    holds(2)
    # The first one, as the link is about to lead to the fourth save, whose folder is whole.
    in_the_end = KILLED.format(event="os.rename", name="last.ckpt.link", argument=0, rank="0", number=2)
    assert ranks(tmp_path / "run", 2, *saving, "--ckpt_path=last", before=in_the_end)[0] == -signal.SIGKILL
    holds(3)
    (tmp_path / "run" / "last.ckpt-best").mkdir()
    (tmp_path / "run" / "last.ckpt-best" / "meta.pt").touch()
    assert ranks(tmp_path / "run", 4, *saving, "--ckpt_path=last", shard_size=2) == [0] * 4
    names = sorted(path.name for path in (tmp_path / "run").glob("*last.ckpt*"))
    assert names == ["last.ckpt", "last.ckpt-000004-1", "last.ckpt-000005", "last.ckpt-best"]
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 5


def test_a_save_is_published_beside_what_else_is_there(tmp_path):
    path, partial = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.partial"
    path.symlink_to("last.ckpt-000099")  # somebody has moved it
    (tmp_path / "last.ckpt-best").mkdir()
    torch.save({"global_step": 0}, tmp_path / "last.ckpt-best" / "meta.pt")
    for step in (1, 2, 2, 3):
        partial.mkdir()
        torch.save({"global_step": step}, partial / "meta.pt")
        _publish(partial, path, 2)
        found = find_checkpoint(tmp_path)
        assert found is not None
        assert (found.path, found.step, found.damaged) == (path, step, {})
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["last.ckpt", "last.ckpt-000002-1", "last.ckpt-000003", "last.ckpt-best"]
    (tmp_path / "last.ckpt-000003" / "meta.pt").write_bytes(b"cut")
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.path.name, found.step) == ("last.ckpt-000002-1", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [("--model.freeze=[video_layers,text]",), ("--model.lora.rank=2",)], ids=["freeze", "lora"]
)
def test_a_part_of_a_pretrained_model_trains_on_two_ranks_as_in_one_process(ranks, fit, alone, tmp_path, how):
    export_wam(alone[2], tmp_path / "wam")
    given = [
        item for item in PACKED if "wam.depth" not in item and "max_steps" not in item and "look_ahead" not in item
    ]
    given += [f"--model.init_from={tmp_path / 'wam'}", "--model.wam=null", "--trainer.max_steps=3", *how]
    expected = fit(tmp_path / "one", *given, "--trainer.accumulate_grad_batches=2")
    assert ranks(tmp_path / "two", 2, *given) == [0, 0]
    assert_close(weights(tmp_path / "two" / "last.ckpt"), weights(expected))


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
