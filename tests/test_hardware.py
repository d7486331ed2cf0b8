import pytest
import torch

from mir_lightning import hardware
from mir_lightning.llava.trainer import RecipeTrainer


@pytest.fixture(params=[{"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ATEN_CPU_CAPABILITY": "avx2"}], ids=str)
def without_bfloat16(request, monkeypatch):
    """Any CPU, limited as one may limit it from outside."""
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def unlimited(monkeypatch):
    for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)


def test_the_cpus_own_flags_decide(unlimited):
    flags = torch.cpu.get_capabilities()
    native = bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16") or flags.get("sve_bf16"))
    assert hardware.cpu_has_bfloat16() == native
    precision, reason = hardware.best_precision("cpu")
    assert precision == ("bf16-mixed" if native else "32-true")
    assert reason == f"this CPU {'computes' if native else 'does not compute'} bfloat16 natively"


def test_a_limited_cpu_trains_and_loads_in_float32(without_bfloat16):
    assert hardware.best_precision("cpu") == ("32-true", "this CPU does not compute bfloat16 natively")
    assert hardware.cpu_dtype(torch.bfloat16) == torch.float32
    assert hardware.cpu_dtype(torch.float32) == torch.float32


def test_float16_is_never_native_on_a_cpu_and_float64_stays():
    assert hardware.cpu_dtype(torch.float16) == torch.float32
    assert hardware.cpu_dtype(torch.float64) == torch.float64


def test_an_accelerator_of_which_nothing_is_known():
    assert hardware.best_precision("mps") == ("32-true", "nothing is known of bfloat16 on accelerator mps")


def _trainer(tmp_path, **options):
    return RecipeTrainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, **options)


def test_the_recipes_trainer_takes_what_suits_and_says_why(tmp_path, without_bfloat16):
    assert _trainer(tmp_path).precision == "32-true"
    trainer = _trainer(tmp_path, precision="auto")
    assert (trainer.precision, trainer.precision_reason) == (
        "32-true",
        "this CPU does not compute bfloat16 natively",
    )
    asked = _trainer(tmp_path, precision="64-true")
    assert (asked.precision, asked.precision_reason) == ("64-true", "as asked for")


def test_who_forces_bfloat16_is_told_what_it_costs(tmp_path, without_bfloat16):
    with pytest.warns(UserWarning, match=r"precision=bf16-mixed: .* take \d+\.\d times as long as in float32"):
        _trainer(tmp_path, precision="bf16-mixed")


def test_the_cost_is_that_of_these_products_here():
    hardware.bfloat16_slowdown.cache_clear()
    assert 0.01 < hardware.bfloat16_slowdown() < 1000
    assert hardware.bfloat16_slowdown() == hardware.bfloat16_slowdown()


@pytest.mark.parametrize(
    ("capability", "slow"), [((8, 0), False), ((9, 0), False), ((8, 6), True), ((8, 9), True), ((12, 0), True)]
)
def test_cards_for_graphics_are_slow_in_float64(monkeypatch, capability, slow):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.float64_is_slow(torch.device("cuda")) == slow
    assert not hardware.float64_is_slow(torch.device("cpu"))
