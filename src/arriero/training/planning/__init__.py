"""What a training run needs, told before it: memory of one device by kind, arithmetic, time, and what fits."""
