"""A backend that is asked for works or says what is missing; auto takes the best that works."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from tprt.attention import AttentionSetup, make_attention_backend, registry
from tprt.attention.requirements import REQUIREMENTS
from tprt.attention.sdpa import SdpaBackend
from tprt.config import RuntimeConfig
from tprt.errors import ConfigError

BF16 = torch.bfloat16


class Kernels(SdpaBackend):
    """Stands for a backend that imports."""


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules of `tprt.attention` that import; empty at first."""
    names: list[str] = []

    def import_module(module: str) -> object:
        name = module.removeprefix("tprt.attention.")
        if name not in names:
            raise ModuleNotFoundError(f"No module named '{name}_kernels'")
        backend = type(name, (Kernels,), {"name": name})
        classes = ("FlashAttention3Backend", "FlashAttention2Backend", "TritonBackend", "SdpaBackend")
        return SimpleNamespace(**dict.fromkeys(classes, backend))

    monkeypatch.setattr(registry, "importlib", SimpleNamespace(import_module=import_module))
    return names


def setup_on(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (9, 0),
    dtype: torch.dtype = BF16,
    head_dim: int = 128,
    block_size: int = 256,
) -> AttentionSetup:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return AttentionSetup(torch.device("cuda"), dtype, head_dim, block_size)


@pytest.mark.parametrize(
    ("capability", "there", "expected"),
    [
        ((9, 0), ["flash_attn_3", "flash_attn", "triton"], "flash_attn_3"),
        ((9, 0), ["flash_attn", "triton"], "flash_attn"),
        ((9, 0), ["triton"], "triton"),
        ((9, 0), [], "sdpa"),
        ((10, 0), ["flash_attn_3", "flash_attn", "triton"], "flash_attn"),
        ((8, 6), ["flash_attn_3", "flash_attn", "triton"], "flash_attn"),
        ((7, 5), ["flash_attn_3", "flash_attn", "triton"], "triton"),
        ((7, 0), ["flash_attn_3", "flash_attn", "triton"], "sdpa"),
    ],
)
def test_auto_takes_the_best_that_imports_and_runs_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
    importable: list[str],
    capability: tuple[int, int],
    there: list[str],
    expected: str,
) -> None:
    importable += there
    setup = setup_on(monkeypatch, capability)
    assert make_attention_backend("auto", 1.0, setup).name == expected


def test_auto_passes_over_what_does_not_fit_the_model(
    monkeypatch: pytest.MonkeyPatch, importable: list[str]
) -> None:
    importable += ["flash_attn_3", "flash_attn", "triton"]
    for setup, expected in (
        (setup_on(monkeypatch, dtype=torch.float32), "triton"),
        (setup_on(monkeypatch, head_dim=100), "triton"),
        (setup_on(monkeypatch, dtype=torch.float32, block_size=24), "sdpa"),
        (setup_on(monkeypatch, (8, 0), block_size=16), "triton"),
    ):
        assert make_attention_backend("auto", 1.0, setup).name == expected


def test_on_a_cpu_auto_is_plain_torch_and_the_others_are_refused() -> None:
    setup = AttentionSetup(torch.device("cpu"), torch.float32, 64, 256)
    assert make_attention_backend("auto", 1.0, setup).name == "sdpa"
    for name in REQUIREMENTS:
        with pytest.raises(ConfigError, match=f"{name} does not work here: it needs a CUDA device, found cpu"):
            make_attention_backend(name, 1.0, setup)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("flash_attn", {"block_size": 16}, "multiple of 256 tokens, found 16; set cache.block_size to 256"),
        ("triton", {"block_size": 24}, "power of two of tokens, found 24; change cache.block_size"),
        ("flash_attn_3", {"dtype": torch.float32}, "bfloat16, float16, found float32; change model.dtype"),
        ("flash_attn_3", {"capability": (8, 0)}, "compute capability 9.x, found 8.0"),
        ("flash_attn_3", {"capability": (12, 0)}, "compute capability 9.x, found 12.0"),
        ("flash_attn", {"capability": (7, 5)}, "compute capability 8.0 or higher, found 7.5"),
        ("flash_attn", {"head_dim": 100}, "256 numbers at most, a multiple of 8, found 100"),
        ("triton", {"head_dim": 320}, "256 numbers at most, found 320"),
        ("flash_attn_3", {}, r"pip install tokenspeed-fa3\), whose import failed \(No module named"),
        ("flash_attn", {}, "pip install flash-attn"),
        ("triton", {}, "comes with torch for CUDA"),
    ],
)
def test_a_backend_that_cannot_work_says_what_is_missing_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    importable: list[str],
    name: str,
    changed: dict[str, object],
    message: str,
) -> None:
    setup = setup_on(monkeypatch, **changed)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message) as raised:
        make_attention_backend(name, 1.0, setup)
    assert str(raised.value).startswith(f"runtime.attention_backend {name} does not work here")
    assert "auto" in str(raised.value)


def test_the_choice_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, importable: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    importable.append("triton")
    monkeypatch.setattr(logging.getLogger("tprt"), "propagate", True)
    with caplog.at_level("INFO", logger="tprt"):
        make_attention_backend("auto", 1.0, setup_on(monkeypatch))
    assert [record.getMessage() for record in caplog.records] == ["attention backend: triton"]


def test_the_settings_name_the_backends_in_the_order_of_auto() -> None:
    names = RuntimeConfig.model_json_schema()["properties"]["attention_backend"]["enum"]
    assert names == ["auto", *REQUIREMENTS, "sdpa"]
