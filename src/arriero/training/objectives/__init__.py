"""What a run makes smaller: of each token, or of each pair of answers."""
