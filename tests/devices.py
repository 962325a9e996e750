"""Devices that a test runs on: always the first GPU, where the test is marked `cuda`; the same function also runs on the CPU,
in `make test` where it takes about a second, else in `make slow`, so that little of it is executed for the first time on a GPU."""
import pytest

def _on(*cpu): return pytest.mark.parametrize('device', [*cpu, pytest.param('cuda', marks=pytest.mark.cuda)])
quick_on_cpu,slow_on_cpu,gpu_alone = _on('cpu'),_on(pytest.param('cpu', marks=pytest.mark.slow)),_on()
