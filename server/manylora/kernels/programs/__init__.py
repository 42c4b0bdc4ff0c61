"""What runs on a GPU, in Triton. Imported by the modules that launch it, and by no other: a CPU has no Triton."""
