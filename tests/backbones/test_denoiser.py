"""Compiled networks: one size of batch, and what a compiler that fails says."""

import pytest
import torch
from conftest import run
from torch import nn

from mgd3.backbones.denoiser import Denoiser
from mgd3.config.command import errors_for_people
from mgd3.runtime.batching import Batches
from mgd3.runtime.compute import Compute, as_written


class Seen(nn.Module):
    """Adds a row's own numbers, and keeps the sizes that it was called with."""

    def __init__(self, most=100):
        super().__init__()
        self.sizes, self.most = [], most

    def forward(self, x_t, t, condition):
        self.sizes.append(len(x_t))
        if len(x_t) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x_t + t.view(-1, 1, 1, 1) + condition.view(-1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _eager():
    """The padding is what counts here; compiling itself takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def rows(count):
    return torch.randn(count, 1, 2, 2), torch.arange(count), 10 * torch.arange(count)


def test_a_compiled_network_sees_the_last_batch_filled_up_and_gives_its_rows():
    network = Seen()
    denoiser = Denoiser(network, Compute(device="cpu", compile=True))
    for count in (8, 8, 3):
        given = rows(count)
        assert torch.equal(denoiser(*given), Seen()(*given))
    assert network.sizes == [8, 8, 8]
    with as_written():  # a probe of the memory
        denoiser(*rows(2))
    assert network.sizes[-1] == 2


def test_without_compiling_every_batch_has_its_own_size():
    network = Seen()
    denoiser = Denoiser(network, Compute(device="cpu"))
    for count in (8, 3):
        denoiser(*rows(count))
    assert network.sizes == [8, 3]


def test_batches_that_were_halved_are_not_filled_up_again():
    network = Seen(most=4)
    denoiser = Denoiser(network, Compute(device="cpu", compile=True))
    x_t, t, condition = rows(8)
    done = []
    for attempt in Batches(8, "sampling").attempts(range(8)):
        with attempt as part:
            at = list(part)
            done.append(denoiser(x_t[at], t[at], condition[at]))
    assert network.sizes == [8, 4, 4]
    assert torch.equal(torch.cat(done), Seen()(x_t, t, condition))


def test_a_compilation_that_fails_is_one_line_with_a_way_on(capsys):
    def backend(graph, inputs):
        raise OSError("fatal error: omp.h: No such file")

    with pytest.raises(SystemExit), errors_for_people(), torch.compiler.set_stance("default"):
        torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(3, 2))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: compute.compile: torch.compile failed")
    assert "omp.h: No such file" in line and "compute.compile=false goes on where" in line


def test_gpu_fast_without_a_gpu_says_so_and_what_to_take(tmp_path):
    done = run(tmp_path, "dataset=digits", "compute=gpu_fast", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "compute.device=cuda is not available here" in done.stderr
    assert "compute=gpu_fast asks for cuda, compute=auto takes what there is" in done.stderr
