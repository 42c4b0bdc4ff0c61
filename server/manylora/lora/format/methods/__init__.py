"""PEFT's methods beside LoRA: what each one's tensors do to a module, said in terms."""
