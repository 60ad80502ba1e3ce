"""Device and number format: what `auto` means, what is refused, and that numbers stay what they are called."""

import os

import pytest
import torch
import torch.nn.functional as F

from opsin.errors import ConfigError
from opsin.training import precision

CPU = torch.device("cpu")


def test_auto_takes_the_gpu_where_there_is_one() -> None:
    assert precision.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert precision.choose_device("cpu") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"device: 'cuda:1' was asked for, .* sees no GPU; use device=cpu"):
        precision.choose_device("cuda:1")


@pytest.mark.gpu
def test_a_gpu_that_does_not_exist_is_refused_with_those_that_do() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=rf"'cuda:{count}' does not exist; this machine has cuda:0 to"):
        precision.choose_device(f"cuda:{count}")


@pytest.mark.parametrize(
    ("capabilities", "value"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")]
)
def test_auto_on_a_cpu_is_bf16_where_the_chip_has_units_for_it(
    capabilities: dict[str, object], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    choice = precision.choose_precision("auto", CPU)
    assert choice.value == value
    assert "CPU" in choice.reason


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(("limit", "value"), [("AVX2", "fp32"), ("avx512_core", "fp32"), ("AVX512_CORE_AMX", "bf16")])
def test_auto_on_a_cpu_follows_the_limit_of_the_kernel_library(
    name: str, limit: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setenv(name, limit)
    choice = precision.choose_precision("auto", CPU)
    assert choice.value == value
    assert (f"{name}={limit}" in choice.reason) == (value == "fp32")


@pytest.mark.parametrize(
    ("asked", "capability", "value"), [("auto", (9, 0), "bf16"), ("auto", (7, 5), "fp16"), ("fp32", (7, 5), "fp32")]
)
def test_auto_on_a_gpu_is_bf16_from_compute_capability_8(
    asked: str, capability: tuple[int, int], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.choose_precision(asked, torch.device("cuda")).value == value


@pytest.mark.parametrize("asked", ["bf16", "tf32"])
def test_formats_that_an_old_gpu_lacks_are_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=rf"precision: '{asked}' needs .* 8.0, this GPU has 7.5; use precision=fp16"):
        precision.choose_precision(asked, torch.device("cuda"))


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"'tf32' exists on CUDA only; use precision=fp32"):
        precision.choose_precision("tf32", CPU)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_layer_computes_in_the_format_that_was_chosen(name: str, dtype: torch.dtype) -> None:
    context = precision.autocast(CPU, name)
    images, weight = torch.ones(2, 4), torch.ones(3, 4)
    for _ in range(2):  # a fresh context for each forward pass
        with context():
            assert F.linear(images, weight).dtype == dtype
    assert F.linear(images, weight).dtype == torch.float32


@pytest.mark.usefixtures("torch_switches")
def test_fp32_stays_fp32_with_the_switches_set() -> None:
    precision.configure(CPU, "fp32", deterministic=True)
    generator = torch.Generator().manual_seed(1)
    # As large as the layers of a real network: small products may take another path through oneDNN.
    images, weight = torch.randn(512, 384, generator=generator), torch.randn(768, 384, generator=generator)
    exact = images.double() @ weight.double().T
    error = (F.linear(images, weight).double() - exact).abs().max() / exact.abs().max()
    # Sums of 384 products: 1e-6 in fp32, 1e-3 if a factor were rounded to bf16.
    assert error < 1e-5
    upstream = torch.randn(512, 768, generator=generator)
    weight.requires_grad_()
    F.linear(images, weight).backward(upstream)
    exact = upstream.double().T @ images.double()
    assert weight.grad is not None
    assert (weight.grad.double() - exact).abs().max() / exact.abs().max() < 1e-5


@pytest.mark.usefixtures("torch_switches")
def test_the_check_of_onednn_leaves_its_switch_as_it_was() -> None:
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # not in torch's stubs
    before = switch.fp32_precision
    precision.onednn_keeps_fp32()
    assert switch.fp32_precision == before


@pytest.mark.usefixtures("torch_switches")
@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_kernels_are_switched_on_and_off(deterministic: bool) -> None:
    precision.configure(CPU, "bf16", deterministic=deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "fused attention on CUDA would take it as no"
    assert torch.backends.cudnn.benchmark != deterministic
    if deterministic:
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]


@pytest.mark.usefixtures("torch_switches")
@pytest.mark.parametrize("deterministic", [True, False])
def test_attention_never_makes_a_plan_for_each_shape(deterministic: bool) -> None:
    """cuDNN's would be the first choice on newer GPUs; what is left is flash, then memory-efficient."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    precision.configure(CPU, "bf16", deterministic=deterministic)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.usefixtures("torch_switches")
def test_the_gpu_of_a_run_is_the_current_one_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in (CPU, torch.device("cuda")):
        precision.configure(device, "fp32", deterministic=True)
    assert not chosen
    precision.configure(torch.device("cuda:1"), "bf16", deterministic=True)
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.usefixtures("torch_switches")
def test_every_line_told_is_one_line() -> None:
    assert all("\n" not in line for line in precision.configure(CPU, "fp32", deterministic=True))
    assert precision.describe_device(CPU).endswith("threads")


def test_peak_memory_covers_what_is_held() -> None:
    held = torch.ones(8_000_000)
    assert precision.peak_memory_bytes(CPU) > held.nbytes
