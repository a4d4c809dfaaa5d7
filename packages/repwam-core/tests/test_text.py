"""Token states of an instruction do not depend on its neighbours, and known instructions need no text model."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repvitok.runtime.errors import UserError
from repwam_core.text import TextEncoder
from safetensors.torch import save_file
from transformers import BatchEncoding


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder()


def test_an_instruction_is_the_same_alone_and_in_a_batch(encoder):
    together, mask = encoder.encode(["open the faucet", "press the button from the top", ""])
    alone, _ = TextEncoder().encode(["open the faucet"])
    assert torch.equal(together[0, : alone.shape[1]], alone[0])
    assert not together[~mask].any()
    assert mask.sum(dim=1).tolist() == [alone.shape[1], mask.shape[1], 2]
    assert together.shape[-1] == encoder.dim == 384


def test_open_and_close_differ_in_their_tokens(encoder):
    tokens, _ = encoder.encode(["open the faucet", "close the faucet"])
    assert (tokens[0] - tokens[1]).norm(dim=-1).max() > 1


def test_a_cache_file_replaces_the_text_model(encoder, tmp_path, monkeypatch):
    tokens, mask = encoder.encode(["open the faucet", ""])
    encoder.save_cache(tmp_path / "text.safetensors")
    monkeypatch.setattr("repwam_core.text._load", lambda *_: pytest.fail("the text model was loaded"))
    cached = TextEncoder()
    cached.load_cache(tmp_path / "text.safetensors")
    assert cached.knows(["open the faucet", ""])
    again, mask_again = cached.encode(["open the faucet", ""])
    assert torch.equal(tokens, again)
    assert torch.equal(mask, mask_again)
    assert cached.dim == 384
    with pytest.raises(ValueError, match="made by text encoder 'minilm', not 'other'"):
        TextEncoder("other").load_cache(tmp_path / "text.safetensors")


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
def test_a_changed_bit_of_a_cache_file_is_refused(place, tmp_path):
    path = tmp_path / "text.safetensors"
    encoder = TextEncoder()
    encoder._given["go"] = torch.randn(4, 384, generator=torch.Generator().manual_seed(0))
    encoder.save_cache(path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"text\.safetensors"):
        TextEncoder().load_cache(path)


def test_a_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded"):
        TextEncoder(str(tmp_path)).encode(["go"])


@pytest.mark.parametrize("name", ["encodr", "rnus/encoder", "hf://owner/encoder", "./encoder", "~/encoder", "a/b/c"])
def test_the_hub_is_asked_only_where_the_name_says_so(name, tmp_path, monkeypatch):
    offline = []

    def look(_source, *, local_files_only, **_):
        offline.append(local_files_only)
        raise OSError("nothing there")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", look)
    with pytest.raises(ValueError, match="hf://owner/name"):
        TextEncoder(name).encode(["go"])
    assert all(offline) or name.startswith("hf://")


def test_no_instruction_and_a_too_long_one_are_errors(encoder):
    with pytest.raises(ValueError, match="at least one instruction"):
        encoder.encode([])
    with pytest.raises(ValueError, match="the limit is 8"):
        TextEncoder(max_tokens=8).encode(["word " * 20])


def test_a_text_of_megabytes_is_refused_before_it_is_tokenised(monkeypatch):
    monkeypatch.setattr("repwam_core.text._load", lambda *_: pytest.fail("the text model was loaded"))
    for text in ("go " * 500_000, "ü" * 2049):
        with pytest.raises(ValueError, match=r"bytes, the limit is 4096"):
            TextEncoder().encode([text])


class Counting:
    """A text model of one token per word whose hidden states are 1 KB each; counts its passes."""

    def __init__(self):
        self.seen: list[str] = []

    def tokenize(self, text, **_):
        self.seen.append(text)
        return BatchEncoding({"input_ids": torch.zeros(1, len(text.split()), dtype=torch.long)})

    def __call__(self, input_ids):
        return SimpleNamespace(last_hidden_state=torch.full((*input_ids.shape, 256), float(len(self.seen))))


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(1, 8))
def test_the_cache_holds_the_last_used_within_its_limit(words, limit_kb):
    """Whatever is asked for: what is kept fits, is what was used last, and answers are those of an endless cache."""
    bounded, endless = TextEncoder(cache_bytes=1024 * limit_kb), TextEncoder()
    bounded._loaded, endless._loaded = ((counting.tokenize, counting) for counting in (Counting(), Counting()))
    model, order = bounded._loaded[1], []
    for count in words:
        text = " ".join(["go"] * count)
        before = bounded.knows([text]), len(model.seen)
        tokens, _ = bounded.encode([text])
        assert tokens.shape == endless.encode([text])[0].shape
        assert len(model.seen) == before[1] + (not before[0])
        order = [other for other in order if other != text] + [text]
        kept = sorted(bounded.known, key=order.index)
        assert sum(1024 * len(known.split()) for known in kept) <= 1024 * limit_kb
        assert kept == order[len(order) - len(kept) :]
        if count <= limit_kb:
            assert bounded.knows([text])


def test_instructions_of_a_file_stay_however_many_others_come(tmp_path):
    states = {str(row): torch.zeros(100, 256) for row in range(2)}
    save_file(states, tmp_path / "text.safetensors", {"text_encoder": "minilm", "instructions": '["open", "close"]'})
    encoder = TextEncoder(cache_bytes=4096)
    encoder.load_cache(tmp_path / "text.safetensors")
    encoder._loaded = (Counting().tokenize, Counting())
    for count in range(50):
        encoder.encode([f"text {count}"])
    assert encoder.knows(["open", "close", "text 49"])
    assert len(encoder.known) == 4
