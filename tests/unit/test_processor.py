"""What native code needs of a processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero import processor_info
from arriero.export import processor

V3 = "abm avx avx2 bmi1 bmi2 f16c fma movbe"


def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, cpuinfo: str) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(processor_info, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: name)


def test_what_compiled_code_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(
        monkeypatch, tmp_path, "x86_64", f"processor\t: 0\nflags\t\t: fpu sse {V3}\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )
    assert processor.needed_isa("") == f"x86_64 {V3}"
    vnni = processor.needed_isa(" -mavx512f -mavx512vnni -mfma -march=native -O3 -mamx-tile")
    assert vnni == "x86_64 abm amx_tile avx avx2 avx512_vnni avx512f bmi1 bmi2 f16c fma movbe"
    assert processor.lacks(f"x86_64 {V3}") is None
    assert processor.lacks("x86_64") is None
    assert processor.lacks(vnni) == "amx_tile"
    assert processor.lacks(f"aarch64 {V3}") == "a machine of the kind aarch64"
    assert processor.lacks("") == "a machine of the kind "


def test_elsewhere_all_features_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, tmp_path, "aarch64", "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd sve\n")
    assert processor.needed_isa("-mcpu=native") == "aarch64 asimd fp sve"
    assert processor.lacks("aarch64 asimd") is None
    assert processor.lacks("aarch64 asimd bf16") == "bf16"


def test_this_machine_has_what_it_has() -> None:
    import torch

    assert ("avx2" in processor_info.features()) == torch.cpu._is_avx2_supported()
    assert ("avx512f" in processor_info.features()) == torch.cpu._is_avx512_supported()
