"""What is packed comes back, byte for byte as openpi's clients write it; what is damaged is a ValueError, always."""

from contextlib import suppress

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repwam_core.policy.serving.protocol import MAX_ITEMS, pack, unpack

DTYPES = ["|b1", "|u1", "|i1", "<u2", "<i4", "<i8", "<f2", "<f4", "<f8"]


@settings(deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 99))
def test_arrays_come_back(dtype, shape, seed):
    array = np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
    back = unpack(pack({"a": {"b": [array]}}))["a"]["b"][0]
    assert back.dtype == array.dtype
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)


def test_plain_values_and_scalars_come_back():
    message = {"text": "zur Tür", "whole": -3, "real": 0.5, "none": None, "flag": True, "scalar": np.float32(1.5)}
    back = unpack(pack(message))
    assert back == message
    assert type(back["scalar"]) is np.float32


def test_bytes_of_an_array_by_hand():
    """The format is openpi's: byte-string keys, raw data, numpy's name of the dtype."""
    packed = pack({"state": np.array([[1.0, 2.0]], np.float32)})
    assert msgpack.unpackb(packed) == {
        "state": {
            b"__ndarray__": True,
            b"data": bytes.fromhex("0000803f00000040"),
            b"dtype": "<f4",
            b"shape": [1, 2],
        }
    }


def test_another_byte_order_and_array_order_are_read_right():
    big = np.arange(6, dtype=">f4").reshape(2, 3)
    back = unpack(pack({"a": big, "b": np.asfortranarray(big)}))
    assert back["a"].dtype == np.dtype("=f4")
    np.testing.assert_array_equal(back["a"], big)
    np.testing.assert_array_equal(back["b"], big)


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, "c8"), np.zeros(2, "M8[s]"), np.array(["a"])])
def test_only_numbers_are_packed(value):
    with pytest.raises(ValueError, match="booleans, integers and floats"):
        pack({"a": value})


def array(**changes):
    whole = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({"a": whole | changes})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "whole msgpack message"),
        (pack({"a": np.zeros(100)})[:-1], "whole msgpack message"),
        (pack({"a": 1}) + b"\x00", "whole msgpack message"),
        (b"\xc1", "whole msgpack message"),
        (msgpack.packb([1]), "a map with names as keys"),
        (msgpack.packb({b"a": 1}), "a map with names as keys"),
        (msgpack.packb({1: 1}), "whole msgpack message"),
        (b"\x81\xa1\xff\x01", "whole msgpack message"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "whole msgpack message"),
        (array(**{"dtype": 1}), "keys"),
        (array() + array(), "whole msgpack message"),
        (msgpack.packb({"a": {b"__ndarray__": True}}), "keys"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}}), "without a number"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}), "does not fit"),
    ],
)
def test_damaged_messages_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        unpack(data)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (b"dtype", "|O", "dtype"),
        (b"dtype", "|V8", "dtype"),
        (b"dtype", "<f4,<f4", "dtype"),
        (b"dtype", "<f3", "dtype"),
        (b"dtype", 4, "dtype"),
        (b"shape", [3], "8 bytes"),
        (b"shape", [-2], "shape"),
        (b"shape", [True, 2], "shape"),
        (b"shape", "2", "shape"),
        (b"shape", [1] * 9, "shape"),
        (b"shape", [2**40, 2**40], "8 bytes"),
        (b"data", "12345678", "str bytes"),
    ],
)
def test_an_array_whose_parts_do_not_fit_is_refused(key, value, message):
    whole = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    with pytest.raises(ValueError, match=message):
        unpack(msgpack.packb({"a": whole | {key: value}}))


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\xa1a\xdd\xff\xff\xff\xff",  # a list that says it has 4 G entries
        b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0",  # lists in lists in lists
        msgpack.packb({"a": [[{}] * 100] * 100}),  # few bytes, many maps
        msgpack.packb({"a": [None] * (MAX_ITEMS + 1)}),
    ],
)
def test_a_message_that_would_unfold_is_refused(data):
    with pytest.raises(ValueError, match="at most"):
        unpack(data)


@settings(deadline=None)
@given(st.integers(4097, 300_000), st.sampled_from(["prompt", "camera", "key", "dtype"]))
def test_a_text_over_the_limit_is_refused_before_it_is_decoded(size, place):
    text = b"\xff" * size  # no UTF-8: decoding it would say so
    message = {
        "prompt": {"prompt": text},
        "camera": {"images": {text: 1}},
        "key": {text: 1},
        "dtype": {"a": {b"__ndarray__": True, b"dtype": text}},
    }[place]
    packed = msgpack.packb(message, use_bin_type=False)
    with pytest.raises(ValueError, match=f"prompts and names of at most 4096 bytes, got one of {size}"):
        unpack(packed)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_a_value_error_or_a_message(data):
    with suppress(ValueError):
        assert isinstance(unpack(data), dict)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_flipped_byte_is_a_value_error_or_a_message(place, byte):
    data = bytearray(pack({"images": {"top": np.zeros((8, 6, 3), np.uint8)}, "state": np.zeros(2, np.float32)}))
    data[place % len(data)] = byte
    with suppress(ValueError):
        assert isinstance(unpack(bytes(data)), dict)
