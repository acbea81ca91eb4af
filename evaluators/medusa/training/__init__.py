"""Head training: prompts, self-distillation, losses, files."""
