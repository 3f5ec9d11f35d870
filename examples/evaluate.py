"""Score models on labelled rows, side by side: `python examples/evaluate.py DATA MODEL [MODEL ...]`."""

import sys

import arriero

if len(sys.argv) < 3:
    sys.exit(f"usage: python {sys.argv[0]} DATA MODEL [MODEL ...]")
data, *names = sys.argv[1:]
print(f"{'model':40} {'loss':>8} {'ppl':>10} {'accuracy':>8}")
for name in names:
    try:
        scores = arriero.evaluate(name, dataset_path=data, device="cpu", per_device_eval_batch_size=8)
    except arriero.ArrieroError as error:  # one line for people: what, where, what to do
        sys.exit(f"{name}: {error}")
    print(f"{name[-40:]:40} {scores['loss']:8.4f} {scores['ppl']:10.2f} {scores['accuracy']:8.4f}")
