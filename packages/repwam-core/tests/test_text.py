"""Token states of an instruction do not depend on its neighbours, and known instructions need no text model."""

import pytest
import torch
from repwam_core.text import TextEncoder


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


def test_a_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded"):
        TextEncoder(str(tmp_path)).encode(["go"])


def test_no_instruction_and_a_too_long_one_are_errors(encoder):
    with pytest.raises(ValueError, match="at least one instruction"):
        encoder.encode([])
    with pytest.raises(ValueError, match="the limit is 8"):
        TextEncoder(max_tokens=8).encode(["word " * 20])
