"""Models as folders: config.json and model.safetensors, written whole, loaded strictly, named by a digest.

Shared by RepViTok, the latent action tokenizer and the world action model, so that all three save and load
alike, and are sent to the device that a command line names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repvitok.runtime.documents import load_json
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_folder, kind_in_words, kind_of, readable, refuse_foreign

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
README_FILE = "README.md"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
"""The weights of a model folder in the layout of diffusers."""
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, README_FILE)
"""All that a model folder holds."""
HUB = "hf://"
INSTALLED = "repvitok.weights"
"""Entry points of an installed distribution that carries weights: a model's name, and the package with its folder."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

Model = TypeVar("Model", bound="PretrainedModel")  # beartype cannot check typing.Self on a lone method


class Config(Protocol):
    """What a stored config must offer: strict conversion to and from plain values."""

    def to_dict(self) -> dict[str, Any]: ...

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], /) -> Any: ...


def drawn_once(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` after which `self.draw()` gives every parameter its initial value, on torch's default device.

    torch draws each layer as it is made, and what is drawn anew afterwards has been drawn twice: 25 s for 1.3 B. On a
    GPU the layers are therefore made without numbers, and drawn there once. On a CPU, where models are small, torch's
    draws stay, and with them the weights that a seed gave in version 0.1. On the meta device nothing is drawn.
    """

    @wraps(init)
    def init_once(self: Any, *arguments: Any, **options: Any) -> None:
        device = torch.empty(0).device  # the default one
        if device.type in ("cpu", "meta"):
            return init(self, *arguments, **options)
        with torch.device("meta"):
            init(self, *arguments, **options)
        self.to_empty(device=device)
        return self.draw()

    return init_once


class PretrainedModel(nn.Module):
    """An `nn.Module` built from one config that can be saved to, loaded from, and named by its contents.

    A subclass takes its config as the only required argument, keeps it in `self.config`, and sets:

    Attributes:
        format: what config.json calls this kind of model, e.g. "repvitok".
        format_version: raised when old files can no longer be read.
        config_class: the class with `to_dict` and a strict `from_dict`.
    """

    format: ClassVar[str]
    format_version: ClassVar[int] = 1
    config_class: ClassVar[type[Config]]
    config: Any

    def save_pretrained(self, folder: str | Path, *, readme: str | None = None) -> Path:
        """Write config.json and model.safetensors into `folder`, both or neither (`files.atomic_folder`).

        A model of the same kind that is there is replaced; its README.md stays unless `readme` is a new one. Weights
        keep their type in the file and are loaded as float32.

        Returns:
            The folder.
        """
        folder = Path(folder)
        if (bad := first_not_finite(self.state_dict())) is not None:
            raise UserError(
                f"{folder}: weight {bad} is not finite; training has diverged: export an earlier checkpoint"
            )
        refuse_another_model(folder, self.format)
        with atomic_folder(folder, (CONFIG_FILE, WEIGHTS_FILE)) as fresh:
            self.write_into(fresh)
            if readme is not None:
                (fresh / README_FILE).write_text(readme, encoding="utf-8")
        return folder

    def write_into(self, folder: Path) -> None:
        """Write config.json and model.safetensors into a folder that nobody reads yet.

        The weights carry the config's hash and their own, so that files of two models, or damaged ones, are refused.
        """
        config = self.describe()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        hashes = {"config_sha256": config_sha256(config), "weights_sha256": _add_weights(hashlib.sha256(), tensors)}
        save_tensors(tensors, folder / WEIGHTS_FILE, {"format": "pt", **hashes})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls: type[Model], source: str | Path, *, revision: str | None = None, local_files_only: bool = False,
        device: str | torch.device = "cpu", dtype: torch.dtype | None = None, verify: bool = True,
    ) -> Model:  # fmt: skip
        """The model stored in a folder, installed under a name, or of a Hugging Face hub id, in evaluation mode.

        Args:
            source: a folder, or a string: the name of an installed model, see `installed_folder`, or of one on the
                hub, see `hub_id`. A `Path` is a folder and nothing else.
            revision: branch, tag or commit on the hub.
            local_files_only: take from the hub's cache on this machine what the hub has given before.
            device: where the weights go, each straight from the file.
            dtype: a floating type to convert the weights to; they are then another model by `digest`.
            verify: compare the weights with the hash in their file; who compares `digest` reads them once instead.

        Raises:
            FileNotFoundError: no such folder, or one of its two files is missing, or the hub could not give
                them.
            ValueError: the folder holds another kind of model, or the files do not fit each other.
        """
        folder = find_folder(source, (CONFIG_FILE, WEIGHTS_FILE), revision, local_files_only=local_files_only)
        stored = read_config(folder, cls.format, cls.format_version)
        try:
            config = cls.config_class.from_dict(stored["config"])
        except UserError as error:
            raise UserError(f"{folder / CONFIG_FILE}: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        tensors = read_weights(folder / WEIGHTS_FILE, model.state_dict(), config_sha256(stored), device, verify)
        model.load_state_dict(tensors, strict=True, assign=True)
        return converted(model.to(device), dtype).eval()  # with what it has and its file has not

    def describe(self) -> dict[str, Any]:
        """What config.json holds: the format, its version, and the config."""
        return {
            "format": self.format,
            "format_version": self.format_version,
            "config": self.config.to_dict(),
        }

    def digest(self) -> str:
        """The identity of this model: sha256 (hex) over its config and weights.

        Every tensor enters by name, dtype, shape and bytes, so two models have one digest exactly if they
        compute the same function from the same files. What a model made carries this, and a mismatch is an
        error.
        """
        return _add_weights(hashlib.sha256(config_sha256(self.describe()).encode()), self.state_dict())


def _add_weights(sha: Any, tensors: Mapping[str, Tensor]) -> str:
    """The hex digest of what `sha` has taken in already and of all tensors by name, dtype, shape and bytes."""
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
        sha.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of which equal contents are equal bytes, in every process.

    safetensors writes its metadata in an order drawn by chance: they are put in order in the file's header, which keeps
    its length.
    """
    save_file(tensors, path, metadata=dict(metadata))
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= length, f"{path}: a header of {length} bytes became {len(ordered)}"
        file.seek(8)
        file.write(ordered.ljust(length))


def config_sha256(config: Mapping[str, Any]) -> str:
    """sha256 (hex) of a config's values, whatever the order of its keys or the layout of its file."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def hub_id(source: str | Path) -> str | None:
    """The "owner/name" that a string names on the Hugging Face hub; None for a path of this machine.

    Only "hf://owner/name" is asked of the hub. A bare "owner/name" without a folder "owner" here is looked for in the
    hub's cache on this machine and nowhere else: it may be a typing mistake in a local path, "rnus/tokenizer", and a
    stranger could own that name. Longer paths, and those that begin with a dot, a slash or a tilde, are paths.
    """
    if not isinstance(source, str):
        return None
    if asks_hub(source):
        if not _HUB_ID.fullmatch(name := source.removeprefix(HUB)):
            raise UserError(f"expected {HUB}owner/name, got {source!r}")
        return name
    return source if _HUB_ID.fullmatch(source) and not Path(source).parent.exists() else None


def asks_hub(source: str | Path) -> bool:
    """Whether the hub may be asked for a source: only where it says so, "hf://owner/name"."""
    return isinstance(source, str) and source.startswith(HUB)


def installed_folder(source: str | Path) -> Path | None:
    """The folder of a model that an installed distribution carries under a name, "repvitok-small"; None without one.

    Such a distribution has an entry point of the group `INSTALLED`: the model's name, and the package in which a folder
    of that name lies. No code of it is run. A file or folder here that is called so comes first.
    """
    if not isinstance(source, str) or not _NAME.fullmatch(source) or Path(source).exists():
        return None
    for point in entry_points(group=INSTALLED, name=source):
        spec = find_spec(point.value.partition(".")[0])  # of a package inside another one, the outer one would be run
        for place in (spec and spec.submodule_search_locations) or ():
            if (folder := Path(place) / source).is_dir():
                return folder
        raise UserError(f"the package {point.value} is to carry the model {source} and does not; install it again")
    return None


def find_folder(
    source: str | Path, files: tuple[str, ...], revision: str | None = None, *, local_files_only: bool = False,
    more: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """The local folder of a stored model: of this machine, installed under a name, or of the hub's, see `hub_id`.

    Args:
        source, revision, local_files_only: as of `PretrainedModel.from_pretrained`.
        files: what must be in it.
        more: what else is fetched from the hub where it is there.

    Raises:
        FileNotFoundError: neither a folder nor obtainable from the hub, or a file is missing in it.
    """
    name, installed = hub_id(source), installed_folder(source)
    if revision is not None and name is None:
        raise UserError(f"revision {revision!r} is of a model of the hub, {HUB}owner/name; {source} is none")
    folder = installed or Path(source)
    if name is not None:
        folder = _hub_folder(name, files + more, revision, ask=asks_hub(source) and not local_files_only)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        known = ", ".join(sorted(entry_points(group=INSTALLED).names)) or "none is, pip install repwam-weights"
        raise FileNotFoundError(
            f"{source} {kind}; expected a folder with {' and '.join(files)}, a model of the hub, {HUB}owner/name, or "
            f"an installed one: {known}"
        )
    folder = readable(folder)
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; expected a folder written by save_pretrained")
    return folder


def save_exported(model: Model, folder: str | Path, card: Callable[[Model], str], half: bool) -> Model:
    """Save a model with its card, and return it as `from_pretrained` gives it: float32.

    With `half` its weights are rounded to float16 before the card is written, and stored so.
    """
    if half:
        model.half().float()
    readme = card(model)
    (model.half() if half else model).save_pretrained(folder, readme=readme)
    return model.float()


def converted(model: Any, dtype: torch.dtype | None) -> Any:
    """The model with weights of a floating type; as it is for None."""
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(f"dtype: expected a floating type such as torch.bfloat16, got {dtype}")
    return model if dtype is None else model.to(dtype)


def push_to_hub(
    folder: str | Path,
    name: str,
    files: tuple[str, ...] = MODEL_FILES,
    *,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Put an exported folder on the Hugging Face hub, whence `from_pretrained("hf://owner/name")` loads it.

    Its owner must be logged in on this machine (`hf auth login`). What else lies in the folder stays here.

    Args:
        folder: of a model, or with `files` of a policy; it must hold a model card, README.md.
        name: "owner/name", with or without "hf://"; made where it is not there.
        files: those that go.
        private: of a new one, whether others see it.
        revision: a branch, made where it is not there.

    Returns:
        The address of what was put there.
    """
    if not _HUB_ID.fullmatch(name := name.removeprefix(HUB)):
        raise UserError(f"expected owner/name, got {name!r}")
    folder = readable(folder)
    kind = kind_of(folder)
    if kind is None or not (folder / README_FILE).is_file():
        raise UserError(f"{folder}: expected an exported folder with its model card, {README_FILE}; export it again")
    try:
        hub = HfApi()
        hub.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(name, branch=revision, exist_ok=True)
        done = hub.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(files), revision=revision, commit_message=kind
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"the Hugging Face hub did not take {folder} as {name} ({_first_line(error)}); log in with `hf auth "
            "login`, check the network and whose the name is"
        ) from error
    return str(done)


def read_config(folder: Path, expected_format: str, expected_version: int) -> dict[str, Any]:
    """The contents of `folder`/config.json, if it describes this kind of model."""
    path = folder / CONFIG_FILE
    stored = load_json(path)
    if not isinstance(stored, dict) or "format" not in stored:
        raise UserError(f'{path}: expected a JSON object with "format": "{expected_format}"; it names no format')
    if stored["format"] != expected_format:
        raise UserError(f'{path}: expected a "{expected_format}" folder, this one holds a "{stored["format"]}" model')
    if stored.get("format_version") != expected_version:
        raise UserError(
            f"{path}: this version reads {expected_format} format version {expected_version}, the file has "
            f"{stored.get('format_version')!r}; install the version that wrote it, or export the model again"
        )
    if set(stored) != {"format", "format_version", "config"} or not isinstance(stored["config"], dict):
        raise UserError(f'{path}: expected the keys "format", "format_version", "config", got {sorted(stored)}')
    return stored


def load_weights(model: nn.Module, tensors: Mapping[str, Any], where: str) -> None:
    """Gives a model its weights: names and shapes exactly the model's, every number finite.

    Args:
        model: on any device, also "meta"; its parameters become these tensors.
        tensors: by name. Of another floating type they are converted, which is logged where it rounds; whole
            numbers are refused.
        where: the file, for messages.
    """
    model.load_state_dict(fitted_weights(tensors, model.state_dict(), where), strict=True, assign=True)


def fitted_weights(tensors: Mapping[str, Any], expected: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors in the types of `expected`; arguments and errors as of `load_weights`."""
    if strange := [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{where}: expected tensors, got something else under {_some(strange)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _require_same_tensors(where, shapes, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    other = [name for name, tensor in tensors.items() if tensor.dtype != expected[name].dtype]
    if wrong := [
        name for name in other if not (tensors[name].is_floating_point() and expected[name].is_floating_point())
    ]:
        first = wrong[0]
        raise UserError(
            f"{where}: {first} is of {tensors[first].dtype}, expected {expected[first].dtype} ({_some(wrong)})"
        )
    if narrowed := [name for name in other if tensors[name].dtype.itemsize >= expected[name].dtype.itemsize]:
        log.warning("%s: %d tensors converted to %s", where, len(narrowed), expected[narrowed[0]].dtype)
    fitted = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    if (bad := first_not_finite(fitted)) is not None:
        raise UserError(f"{where}: weight {bad} is not finite; training has diverged, or the file is damaged")
    return fitted


def read_weights(
    path: Path, expected: Mapping[str, Tensor], config_hash: str | None = None, device: str | torch.device = "cpu",
    verify: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a safetensors file, if they are `fitted_weights` of `expected`.

    Args:
        path: the file.
        expected: a state dict of the right names and shapes; meta tensors will do.
        config_hash: `config_sha256` of the config that was read beside it; compared with what the file says,
            if it does.
        device: where the tensors go. The file is mapped into memory, never read into it as a whole.
        verify: compare them with the hash that the file names, if it does.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            hashes = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _require_same_tensors(str(path), shapes, {name: tuple(tensor.shape) for name, tensor in expected.items()})
            tensors = {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise UserError(f"{path} is no complete safetensors file ({error}); copy or download it again") from error
    if config_hash not in (None, hashes.get("config_sha256", config_hash)):
        raise UserError(
            f"{path} was saved with another {CONFIG_FILE} than the one beside it; a save was interrupted or a file "
            "was edited: save the model again"
        )
    known = hashes.get("weights_sha256") if verify else None
    if known is not None and known != _add_weights(hashlib.sha256(), tensors):
        raise UserError(f"{path} is damaged: its weights are not those that were saved; copy or download it again")
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return fitted_weights(moved, expected, str(path))


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite, None where all are; waits for the device once."""
    flags = {name: value.isfinite().all() for name, value in tensors.items() if value.is_floating_point()}
    if not flags:
        return None
    device = next(iter(flags.values())).device
    finite = torch.stack([flag.to(device) for flag in flags.values()])
    return None if bool(finite.all()) else next(name for name, flag in flags.items() if not flag)


def find_device(name: str | torch.device, process: int = 0) -> torch.device:
    """The device called `name`, tried out with one number.

    Args:
        name: "cpu", "cuda", "cuda:1", another of torch's devices, or "auto": CUDA where there is one.
        process: which of several processes on this machine asks: "auto" and "cuda" are spread over its GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: expected auto, cpu, cuda, cuda:1, ..., got {str(name)!r}") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", process % torch.cuda.device_count())
    if device.type == "meta":
        raise UserError("--device meta: it holds no numbers; use cpu or cuda")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {name}: this machine has no such device ({reason[:120]}); use cpu") from error
    return device


def refuse_another_model(folder: Path, kind: str) -> None:
    """Stop before a model of format `kind` is written over something else."""
    refuse_foreign(folder, MODEL_FILES, f"{kind} model")
    config = readable(folder) / CONFIG_FILE
    if config.exists() and (found := kind_of(config.parent)) != kind_in_words(kind):
        raise UserError(f"{folder} holds {found or 'a config.json of something else'}; name another folder")


def copy_model(source: Path, target: Path) -> None:
    """Copy a model folder's files, and nothing else that lies there, into a folder that nobody reads yet."""
    target.mkdir()
    for name in MODEL_FILES:
        if (readable(source) / name).exists():
            shutil.copyfile(readable(source) / name, target / name)


def _require_same_tensors(
    where: str, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or unexpected:
        raise UserError(
            f"{where} does not hold this model's weights: {len(missing)} tensors missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)})"
        )
    wrong = [f"{name} is {stored[name]}, not {expected[name]}" for name in expected if stored[name] != expected[name]]
    if wrong:
        raise UserError(
            f"{where} does not fit its {CONFIG_FILE}: {len(wrong)} tensors of another shape ({_some(wrong)})"
        )


def _some(names: list[str]) -> str:
    """The first three of `names`, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _hub_folder(name: str, files: tuple[str, ...], revision: str | None, *, ask: bool) -> Path:
    """The files of a model of the hub: in its cache on this machine, or fetched where the hub may be asked."""
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(files), local_files_only=not ask)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"the Hugging Face hub gave no model {name} ({_first_line(error)}); check the spelling and the network, or "
            "give the path of a folder"
            if ask
            else f"{name} does not exist; expected a folder, or a model that the Hugging Face hub has given before; "
            f"{HUB}{name} asks the hub"
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
