"""Devices are named as ``COUNTxNAME``; whatever else is said is refused with what is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crsm.scaling.devices import DEVICES, MAX_DEVICES, parse_devices


@given(st.integers(1, 10_000), st.sampled_from(sorted(DEVICES)))
def test_every_device_of_the_table_can_be_named_in_any_case(count, name):
    for said in (name, name.lower(), name.upper()):
        assert parse_devices(f"{count}x{said}") == (count, DEVICES[name])


def test_one_device_needs_no_count_and_its_memory_may_be_given():
    assert parse_devices("H100") == (1, DEVICES["H100"])
    count, device = parse_devices("4xH100:94GB")
    assert (count, device.name, device.memory, device.bf16_flops) == (4, "H100", 94e9, 989e12)


def test_a_cpu_worker_may_take_all_the_memory_that_is_given():
    count, device = parse_devices("2xcpu:12.5GB")
    assert (count, device.room, device.flops("fp32"), device.is_cpu) == (2, 12.5e9, None, True)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("8xV100", "'V100' is not known; allowed: A10, A100-40"),
        ("0xH100", "0 devices; allowed: 1 to"),
        (f"{MAX_DEVICES + 1}xH100", "devices; allowed: 1 to"),
        ("8 H100", "allowed: COUNTxNAME"),
        ("-1xH100", "allowed: COUNTxNAME"),
        ("", "allowed: COUNTxNAME"),
        ("cpu", "the memory of a worker too, as in 1xcpu:12GB"),
        ("2xcpu:0GB", "no memory; allowed: more than 0 GB"),
    ],
)
def test_another_form_is_refused_with_what_is_allowed(said, message):
    with pytest.raises(ValueError, match="gpus = ") as error:
        parse_devices(said)
    assert message in str(error.value)
