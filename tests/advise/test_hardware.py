"""Latency, bandwidth and rates: the textbook's figures, and files that say something else than they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from autotp.advise.hardware import TABLE, Gpu, Link, bundled, gpu, link, read
from autotp.advise.machine import Machine
from autotp.advise.measured import Pass
from autotp.advise.operators import Work
from autotp.advise.timing import seconds
from autotp.errors import InputError

GOOD = {
    "gpus": {"here": {"memory": 1e9, "bandwidth": 1e9, "flops": {"float32": 1e9}, "compute": 1, "stream": 1, "launch": 0, "serial": True,
                      "source": "a test"}},
    "links": {"gloo": {"bandwidth": 1e9, "efficiency": 1, "base": 1e-4, "step": 0, "source": "a test"}},
}  # fmt: skip


def test_every_number_of_the_table_has_a_source():
    data = yaml.safe_load(TABLE.read_text())
    for entry in (*data["gpus"].values(), *data["links"].values()):
        assert entry["source"] in data["sources"]
    assert {"stream", "compute", "launch", "reserved"} <= set(data["sources"])
    for one in bundled().gpus.values():
        assert one.link in bundled().links


def test_latencies_are_those_of_nccl():
    """7.8 µs over 2 GPUs and 15 µs over 8 by NVLink, 20.6 µs over 8 by PCIe."""
    nvlink, pcie = bundled().links["nvlink4"], bundled().links["pcie5"]
    assert nvlink.seconds(2, 0, 2) == pytest.approx(7.8e-6)
    assert nvlink.seconds(2, 0, 8) == pytest.approx(15e-6)
    assert pcie.seconds(2, 0, 8) == pytest.approx(20.6e-6)
    assert nvlink.seconds(2, 1e9, 1) == 0


def test_bytes_move_twice_around_the_ring_for_a_sum_and_once_for_a_gather():
    nvlink = bundled().links["nvlink4"]
    rate = 0.84 * 450e9
    assert nvlink.seconds(2, 1e9, 8) == pytest.approx(15e-6 + 2 * 7 / 8 * 1e9 / rate)
    assert nvlink.seconds(1, 1e9, 8) == pytest.approx(6.6e-6 + 7 * 0.6e-6 + 7 / 8 * 1e9 / rate)


def test_an_operator_takes_as_long_as_its_slower_side():
    h100, _ = gpu("h100")
    large, small = Work(10**12, 10**6, torch.bfloat16), Work(10**6, 10**9, torch.bfloat16)
    assert h100.seconds(large.flops, large.bytes, large.dtype) == pytest.approx(1e12 / (0.7 * 989e12))
    assert h100.seconds(small.flops, small.bytes, small.dtype) == pytest.approx(1e9 / (0.69 * 3350e9))
    assert h100.rate(torch.float32) < h100.rate(torch.bfloat16)
    assert h100.rate(torch.float64) == h100.rate(torch.float32)  # the widest that is known
    both = Pass({large: 1, small: 2})
    nvlink = bundled().links["nvlink4"]
    compute = seconds(both, h100, nvlink, 1, eager=False).compute
    assert compute == pytest.approx(1e12 / (0.7 * 989e12) + 2 * 1e9 / (0.69 * 3350e9))
    assert seconds(Pass({Work(0, 1, torch.float32): 1000}), h100, nvlink, 1, eager=True).compute == pytest.approx(1000 * h100.launch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": []}, "wanted a mapping with gpus and links"),
        ({"gpus": {"here": {"memory": 1}}}, "gpus.here.bandwidth: Field required"),
        ({"gpus": {"here": {**GOOD["gpus"]["here"], "memory": -1}}}, "gpus.here.memory: Input should be greater than 0, got -1"),
        ({"gpus": {"here": {**GOOD["gpus"]["here"], "flops": {"float33": 1.0}}}}, "names of dtypes"),
        ({"gpus": {"here": {**GOOD["gpus"]["here"], "flops": {"float32": 0}}}}, "rates above 0"),
        ({"gpus": {"here": {**GOOD["gpus"]["here"], "sauce": "none"}}}, "gpus.here.sauce"),
        ({"gpus": {"here": 3}}, "gpus.here"),
        ({"links": {"gloo": None}}, "links.gloo"),
        ({"links": {"gloo": {**GOOD["links"]["gloo"], "efficiency": 2}}}, "links.gloo.efficiency: Input should be less than"),
    ],
)
def test_bad_tables_name_the_entry_and_the_field(tmp_path: Path, change: dict, message: str):
    file = tmp_path / "here.yaml"
    file.write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(InputError) as error:
        read(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_a_file_is_taken_for_a_gpu_and_a_link(tmp_path: Path):
    file = tmp_path / "here.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    one, table = gpu(str(file))
    assert one.name == "here"
    assert link(str(file), bundled()).name == link("gloo", table).name == "gloo"
    file.write_text(yaml.safe_dump({"gpus": {}, "links": {}}))
    with pytest.raises(InputError, match="names 0 gpus, wanted one"):
        gpu(str(file))
    file.write_text("gpus: [")
    with pytest.raises(InputError, match="hardware"):
        gpu(str(file))


@pytest.mark.parametrize("name", ["h10", "", None, "no/such.yaml"])
def test_hardware_that_is_not_known(name: object):
    with pytest.raises(InputError, match=r"near names: h100|wanted the name|No such file"):
        gpu(name)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"link is 'nvlink9'.*near names: nvlink"):
        link("nvlink9", bundled())


def test_what_is_left_out_is_said() -> None:
    here, gloo = Gpu("here", 1e9, 1e9, {"float32": 1e9}, 1, 1, 0, True), Link("gloo", 1e9, 1, 1e-4, 0, most=2)
    assert Machine(6, here, gloo, gloo, False).notes(torch.bfloat16) == (
        "tp=3, 6 is left out: the link gloo joins 2 GPUs",
        "here has no rate for products in bfloat16: another of its rates stands for it",
    )
    assert Machine(2, here, gloo, gloo, False).notes(torch.float32) == ()
