"""Rules between option groups, by what they are about; `arriero.config.compatibility` applies them all."""
