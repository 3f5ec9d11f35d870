"""Update rules that `arriero.training.optimizer` puts together."""
