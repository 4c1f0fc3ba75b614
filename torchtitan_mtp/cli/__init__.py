"""The programs that users run besides the training; scripts/ has a caller of each."""
