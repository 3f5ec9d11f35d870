"""Names of weights of an HF folder that bundles are checked by, where no model code can be imported."""

EMBEDDING = "model.embed_tokens.weight"
