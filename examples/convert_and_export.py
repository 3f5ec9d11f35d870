"""A model in other formats, and as a bundle that runs without torch: `python examples/convert_and_export.py MODEL FOLDER`."""

import sys
from pathlib import Path

import arriero

if len(sys.argv) != 3:
    sys.exit(f"usage: python {sys.argv[0]} MODEL FOLDER")
name, folder = sys.argv[1], Path(sys.argv[2])

try:
    half = arriero.convert(name, folder / "bf16", dtype="bfloat16")  # every tensor is compared with the original
    print(f"half precision: {half}")
    gguf = arriero.convert(name, folder / "model.gguf", gguf_type="q8_0")
    print(f"for llama.cpp: {gguf}")

    bundle = arriero.export_model(name, folder / "bundle", format="onnx", weights="int8")
    model = arriero.load_bundle(bundle)
    print(f"bundle of {sum(path.stat().st_size for path in bundle.iterdir()) / 1e6:.1f} MB: {bundle}")
    print(model.generate("The sky is", max_new_tokens=12).text)
except arriero.ArrieroError as error:  # one line for people: what, where, what to do
    sys.exit(str(error))
