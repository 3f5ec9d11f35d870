"""What each method of fine-tuning trains, and how that is stored."""
