"""On a GPU nothing mixes devices, the numbers are the CPU's, and a policy hardly ever waits: asked of a pretend GPU."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_action import LatentActionConfig, LatentActionTokenizer
from latent_action.cli import main as latent_action
from latent_action.labelling import label_shards
from pretend_gpu import PretendGPU
from repvitok import RepViTok, RepViTokConfig
from repvitok.cli import main as repvitok
from repvitok.data import LatentShards, LeRobotReader
from repvitok.encoding import encode_dataset
from repvitok.runtime.checkpointing import read_checkpoint
from repwam_core import Observation
from repwam_core.cli import main
from repwam_core.data.datamodule import WAMDataModule
from repwam_core.data.packing import PackingSettings
from repwam_core.export import parts_of_checkpoint
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.wam import ZERO_OUTPUTS, WorldActionModel
from repwam_core.policy.policy import BatchedPolicy
from repwam_core.sampling import SamplingConfig
from repwam_core.training.losses import LossSettings
from repwam_core.training.module import WAMTraining
from repwam_core.training.parallel import ScaleSettings
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = {"width": 32, "depth": 2, "heads": 2, "ffn": 64, "action_width": 32, "action_ffn": 64, "state_token": True}
WAITS_PER_CHUNK = 1
RECIPES = Path(__file__).parents[1] / "recipes"


def test_the_pretend_gpu_refuses_what_a_gpu_refuses():
    with PretendGPU() as gpu:
        on_gpu = torch.ones(3, device="cuda")
        assert (on_gpu + 1).is_cuda
        assert not gpu.waits
        for wrong in (
            lambda: on_gpu + torch.ones(3),
            lambda: torch.nn.Linear(3, 3)(on_gpu),
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            lambda: torch.randn(3, generator=torch.Generator("cuda")),
            on_gpu.numpy,
            lambda: np.asarray(on_gpu),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert float(on_gpu.sum()) == 3
        assert on_gpu.cpu().tolist() == [1, 1, 1]
        assert gpu.waits == 2
    assert not torch.zeros(1).is_cuda


class Draws(TorchDispatchMode):
    """Counts the random numbers that are drawn, by where, and how often each tensor on the pretend GPU is filled."""

    def __init__(self):
        super().__init__()
        self.drawn, self.filled = Counter(), Counter()

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in operation.tags and out.device.type != "meta":
            self.drawn[out.device.type] += out.numel()
            if out.is_cuda:
                self.filled[out.values.data_ptr()] += 1
        return out


SPACE = ActionSpace(channels=3, vectors_per_transition=2, state_channels=2)
MODELS = {
    "tokenizer": lambda: RepViTok(RepViTokConfig(width=32, depth=2, heads=2)),
    "wam": lambda: WorldActionModel(WAMConfig.preset("tiny", **SIZES, spaces={"latent": SPACE, "robot": SPACE})),
}


def _random(module):
    """The parameters that do not start at a constant; some are drawn and then set to zero."""
    drawn_to_zero = (*(f"{name}.weight" for name in ZERO_OUTPUTS), "action_out.bias")
    for name, parameter in module.named_parameters():
        value = parameter.detach().cpu()
        if name.endswith(drawn_to_zero) or not ((value == 0) | (value == 1)).all():
            yield parameter


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_made_on_the_gpu_is_drawn_there_once(kind):
    torch.manual_seed(0)
    on_cpu = MODELS[kind]()
    with PretendGPU():
        with Draws() as draws, torch.device("cuda"):
            on_gpu = MODELS[kind]()
        assert all(parameter.is_cuda for parameter in on_gpu.parameters())
        assert set(draws.drawn) == {"cuda"}
        if kind == "wam":
            assert draws.drawn["cuda"] == sum(parameter.numel() for parameter in _random(on_gpu))
        else:  # drawn in place, and beside it what replaces numbers that were cut off
            random = {parameter.values.data_ptr() for parameter in _random(on_gpu)}
            every = {parameter.values.data_ptr() for parameter in on_gpu.parameters()}
            assert {place: draws.filled[place] for place in every} == {place: int(place in random) for place in every}
        ours = {name: parameter.detach().cpu().clone() for name, parameter in on_gpu.named_parameters()}
    for name, expected in on_cpu.named_parameters():  # other numbers of the same distribution
        if expected.numel() > 500:
            torch.testing.assert_close(ours[name].std(), expected.std(), rtol=0.2, atol=1e-6)
            torch.testing.assert_close(ours[name].abs().max(), expected.abs().max(), rtol=0.2, atol=1e-6)
        else:
            assert (ours[name] == 0).all() == (expected == 0).all(), name


def test_a_seed_gives_the_weights_of_version_0_1_on_a_cpu():
    torch.manual_seed(0)
    wam = MODELS["wam"]()
    assert torch.rand(()).item() == pytest.approx(0.1965014)
    assert wam.layers[0].video.ffn_in.weight[0, :3].tolist() == pytest.approx([0.0531891, 0.1392441, -0.2058703])
    assert wam.spaces["robot"].action_in.weight[0].tolist() == pytest.approx([0.1090463, -0.3044176, 0.4862786])


@pytest.mark.parametrize("kind", MODELS)
def test_a_stored_model_is_read_to_the_gpu(kind, tmp_path):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "model")
    with PretendGPU():
        loaded = type(model).from_pretrained(tmp_path / "model", device="cuda")
        assert all(parameter.is_cuda for parameter in loaded.parameters())
        assert loaded.digest() == model.digest()


@pytest.mark.parametrize("init", ["stream", "per_parameter"])
def test_a_model_is_drawn_once_where_it_will_be_trained(noise_latents, init):
    with PretendGPU():
        before = torch.get_rng_state()
        with Draws() as draws:
            module, _ = _training(noise_latents, "robot", packed=True, init=init, device="cuda")
        assert draws.drawn == {"cuda": sum(parameter.numel() for parameter in _random(module.wam))}
        assert torch.equal(torch.get_rng_state(), before)


def _stage(main, recipes, run, *settings):
    """`fit`, `fit` on from its checkpoint, `test` and `predict` on the pretend GPU, as Lightning does them."""
    files = [word for recipe in recipes for word in ("-c", str(RECIPES / recipe))]
    arguments = [*files, f"--trainer.default_root_dir={run}", "--trainer.strategy=pretend_gpu", *settings]
    with PretendGPU():
        for verb, *more in (
            ("fit", "--trainer.max_steps=2", "--trainer.val_check_interval=2"),
            ("fit", "--trainer.max_steps=3", "--trainer.val_check_interval=2", "--ckpt_path=last"),
            ("test", "--trainer.inference_mode=false"),  # which knows no tensors of another kind
            ("predict", "--trainer.inference_mode=false"),
        ):
            assert main([verb, *arguments, *more]) == 0, verb
    assert read_checkpoint(run / "last.ckpt")["global_step"] == 3


@pytest.mark.slow
def test_the_tokenizer_stage_runs_on_the_gpu(shared_video_dataset, tmp_path):
    small = ("--model.tokenizer.width=32", "--model.tokenizer.depth=1", "--model.tokenizer.heads=2")
    data = (f"--data.folders=[{shared_video_dataset}]", "--data.size=[32,32]", "--data.val_clips=2")
    adversary = ("--model.weights.gan=0.1", "--model.adversary.start_step=1", "--model.adversary.width=4")
    _stage(repvitok, ("1_repvitok/tiny.yaml",), tmp_path, *small, *data, *adversary)


@pytest.mark.slow
def test_the_latent_action_stage_runs_on_the_gpu(noise_latents, tmp_path):
    _stage(
        latent_action,
        ("2_latent_action/tiny.yaml",),
        tmp_path,
        f"--data.latents={noise_latents}",
        "--model.lat.latent_dim=8",
    )


@pytest.mark.slow
def test_the_world_model_stage_runs_on_the_gpu(noise_latents, tmp_path):
    fields = ", ".join(f"{name}: {value}" for name, value in SIZES.items())
    data = (f"--data.latents={noise_latents}", "--data.transitions=2", "--data.batch_size=2", "--data.held_out=0.2")
    model = ("--model.init_from=null", f"--model.wam={{{fields}}}", "--data.text_encoder=minilm")
    attention = "--model.scale.attention=blocked"  # FlexAttention wants a real GPU
    _stage(main, ("3_repwam/tiny_adapt.yaml",), tmp_path, *data, *model, attention)


def _training(latents, space, packed, init="stream", device="cpu", **wam):
    """A stage's module with its data, as far as its steps need a trainer."""
    module = WAMTraining(
        "tiny", wam={**SIZES, **wam}, space=space, chunk_sizes=(1, 2),
        scale=ScaleSettings(attention="blocked", init=init),
        plan=SamplingConfig(video_steps=1, action_steps=2),
        loss=LossSettings(video_noise_prob=0.3, history_noise=0.1, text_drop_prob=0.1),
    )  # fmt: skip
    packing = PackingSettings(token_budget=300) if packed else None
    data = WAMDataModule(latents, space=space, held_out=0.2, packing=packing, batch_size=4, transitions=4)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)), precision="32-true", world_size=1, global_step=0,
        global_rank=0, testing=False, max_steps=10, datamodule=data, lightning_module=module,
    )  # fmt: skip
    module._trainer = data.trainer = trainer
    module.log_dict = lambda *_, **__: None
    module.setup("fit")
    return module, data


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("space", "wam"),
    [("robot", {}), ("robot", {"coupling": "sequential"}), ("latent", {}), ("latent", {"joint_actions": 4})],
)
def test_training_and_validation_stay_on_the_gpu(noise_latents, space, wam, packed):
    def whole(device):
        module, data = _training(noise_latents, space, packed, **wam)
        module.to(device)
        module.on_fit_start()
        loss = module.training_step(next(iter(data.train_dataloader())).to(device), 0)
        optimizer = module.configure_optimizers()["optimizer"]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 2.0)
            optimizer.step()
            module._average().update(module._model())
            module.on_validation_start()
            held_out = next(iter(data.val_dataloader())).to(device)
            module.validation_step(held_out, 0)
            if "joint_actions" not in wam:
                module.predict_step(held_out, 0)
            module.on_validation_epoch_end()
            module.on_validation_end()
        return loss.item()

    with PretendGPU():
        on_gpu = whole("cuda")
    assert on_gpu == pytest.approx(whole("cpu"), rel=1e-5)


@pytest.fixture(scope="module")
def policy_parts(shared_video_dataset, tmp_path_factory):
    """What makes parts of a policy, a new one each time."""
    root = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    tokenizer = RepViTok(RepViTokConfig(width=32, depth=1, heads=2, latent_dim=8)).eval()
    tokenizer.save_pretrained(root / "tokenizer")
    encode_dataset(tokenizer, LeRobotReader(shared_video_dataset), root / "latents", size=(32, 48))
    told = {"text_encoder": "minilm", "instructions": json.dumps(["move the square"])}
    save_file({"0": torch.randn(4, 384)}, root / "latents" / "text-minilm.safetensors", told)
    fields = ", ".join(f"{name}: {value}" for name, value in {**SIZES, "window": 2, "attention": "shared"}.items())
    recipe = str(RECIPES / "3_repwam" / "tiny_adapt.yaml")
    run = ["fit", "-c", recipe, "--model.init_from=null", f"--model.wam={{{fields}}}"]
    limits = ["--data.batch_size=2", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    where = [f"--data.latents={root / 'latents'}", f"--trainer.default_root_dir={root / 'run'}"]
    assert main([*run, *limits, *where, "--data.text_encoder=minilm"]) == 0

    def make(device):
        parts = parts_of_checkpoint(root / "run" / "last.ckpt", root / "tokenizer", device)
        parts.text.load_cache(root / "latents" / "text-minilm.safetensors")
        return parts

    return make


@pytest.mark.parametrize("plan", [{}, {"video": "skip"}, {"guidance": 2.0}])
def test_a_policy_waits_for_the_gpu_only_for_its_actions(policy_parts, shared_video_dataset, plan):
    reader = LeRobotReader(shared_video_dataset)
    states = reader.episode(0)["observation.state"].astype(np.float32)
    (camera,) = reader.camera_keys

    def driven(device, waited):
        policy = BatchedPolicy(policy_parts(device), chunk_frames=1, **plan)
        policy.reset(["move the square"], [0])
        for frames in (range(1), range(1, 5), range(5, 9)):
            observation = Observation({camera: reader.frames(0, camera, frames)}, states[frames.start : frames.stop])
            before = waited()
            yield policy.act([observation])[0].actions
            assert waited() - before <= WAITS_PER_CHUNK

    with PretendGPU() as gpu:
        on_gpu = list(driven("cuda", lambda: gpu.waits))
    for ours, expected in zip(on_gpu, driven("cpu", lambda: 0), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_clip_is_encoded_decoded_and_streamed_on_the_gpu():
    torch.manual_seed(0)
    tokenizer = RepViTok(RepViTokConfig(width=32, depth=1, heads=2, latent_dim=8)).eval()
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1

    def whole(device):
        with torch.no_grad():
            z = tokenizer.to(device).encode(video.to(device))
            stream = tokenizer.stream(2)
            streamed = torch.cat([stream.encode(part.to(device)) for part in video.split([1, 4, 4], dim=2)], dim=1)
            return [value.cpu() for value in (z, tokenizer.decode(z, (32, 32)), streamed)]

    expected = whole("cpu")
    with PretendGPU():
        on_gpu = [value.clone() for value in whole("cuda")]
    for ours, theirs in zip(on_gpu, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_latents_are_labelled_on_the_gpu(noise_latents, tmp_path):
    torch.manual_seed(0)
    trained_on = {"tokenizer_digest": "0" * 64, "latent_mean": (0.0,) * 8, "latent_std": (1.0,) * 8}
    lat = LatentActionTokenizer(LatentActionConfig(latent_dim=8, hidden=16, layers=2, **trained_on))
    label_shards(lat, noise_latents, tmp_path / "cpu")
    with PretendGPU():
        label_shards(lat, noise_latents, tmp_path / "gpu", device="cuda")
    ours, expected = (LatentShards(tmp_path / name) for name in ("gpu", "cpu"))
    for number in range(len(expected)):
        labels = ours.mapped(number)["latent_actions"], expected.mapped(number)["latent_actions"]
        np.testing.assert_allclose(*labels, rtol=1e-4, atol=1e-5)
