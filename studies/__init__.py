"""What thresholds do to training; each module is a command."""
