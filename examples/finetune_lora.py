"""Fine-tune with LoRA on your own rows: `python examples/finetune_lora.py [MODEL] [FOLDER]`."""

import sys
from pathlib import Path

import arriero

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/example")

# Your own data, a conversation a row. The path of a file of such rows, a JSON object a line, does as well.
words = [
    ("up", "down"),
    ("hot", "cold"),
    ("wet", "dry"),
    ("big", "small"),
    ("old", "new"),
    ("fast", "slow"),
    ("day", "night"),
]
rows = [
    {
        "messages": [
            {"role": "user", "content": f"The opposite of {word}?"},
            {"role": "assistant", "content": opposite},
        ]
    }
    for word, opposite in words
]
train, dev = rows[:5], rows[5:]

before = arriero.evaluate(name, dataset_path=dev, device="cpu")
run = arriero.finetune(
    name,
    dataset_path={"train": train, "dev": dev},
    output_dir=folder / "adapter",
    overwrite_output_dir=True,
    lora=True,
    lora_rank=8,
    learning_rate=1e-3,
    num_train_epochs=6,
    device="cpu",
)
after = arriero.evaluate(name, adapter=run.folder, dataset_path=dev, device="cpu")
print(f"loss on held-out rows: {before['loss']:.3f} before, {after['loss']:.3f} after")

model = arriero.load(name, adapter=run.folder, device="cpu")
print(model.chat("The opposite of light?", max_new_tokens=8))
